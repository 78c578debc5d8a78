// Memory that will be used soon, asked for line by line in the midst of arithmetic.
//
// A site streams through more memory than the caches hold, in rows that start anew too often for
// the processor to guess them. Asked for early, they are on their way into L2 while registers are
// busy with what is there. What will be written is asked for as such: its lines may lie in the
// caches of another core, which has to give them up. Addresses behind an array's end do no harm.
#pragma once

#include "vec.h"

constexpr int LINE = 64;

// Rows of `each` lines, one row a call.
class Lines {
  public:
    Lines() = default;
    Lines(const char *at, int64_t each, int64_t step, bool write)
        : at(at), each(int(each)), write(write), step(step) {}

    inline __attribute__((always_inline)) void ask() {
        if (write)
            for (int k = 0; k < each; ++k) __builtin_prefetch(at + k * LINE, 1, 2);
        else
            for (int k = 0; k < each; ++k) __builtin_prefetch(at + k * LINE, 0, 2);
        at += step;
    }

  private:
    const char *at = nullptr;
    int each = 0;
    bool write = false;
    int64_t step = 0;
};

// Several pieces of memory, spread evenly over `calls` calls of Lines::ask.
class Ahead {
  public:
    explicit Ahead(int64_t calls) : calls(calls < 1 ? 1 : calls) {}

    void to_read(const Stream *start, int64_t count) { add(start, count, false); }
    void to_write(const Stream *start, int64_t count) { add(start, count, true); }

    // What to ask for in the next `some` calls.
    Lines next(int64_t some) {
        if (current == number) return Lines();
        const int64_t each = (total + calls * LINE - 1) / (calls * LINE);
        const Lines lines(pieces[current].start + done, each, each * LINE,
                          pieces[current].write);
        done += some * each * LINE;
        if (done >= pieces[current].bytes) {
            ++current;
            done = 0;
        }
        return lines;
    }

  private:
    void add(const Stream *start, int64_t count, bool write) {
        if (count <= 0) return;
        const int64_t bytes = count * int64_t(sizeof(Stream));
        pieces[number++] = {reinterpret_cast<const char *>(start), bytes, write};
        total += bytes;
    }

    struct {
        const char *start;
        int64_t bytes;
        bool write;
    } pieces[8];
    int number = 0, current = 0;
    int64_t calls, total = 0, done = 0;
};
