// Memory that will be used soon, asked for line by line in the midst of arithmetic.
//
// A site streams through more memory than the caches hold, in rows that start anew too often for
// the processor to guess them. Asked for early, they are on their way into L2 while registers are
// busy with what is there. Addresses behind the end of an array do no harm.
#pragma once

#include "vec.h"

constexpr int LINE = 64;

// Rows of `each` lines, one row a call.
class Lines {
  public:
    Lines() = default;
    Lines(const char *at, int64_t each, int64_t step) : at(at), each(int(each)), step(step) {}

    inline __attribute__((always_inline)) void ask() {
        for (int k = 0; k < each; ++k) __builtin_prefetch(at + k * LINE, 0, 2);
        at += step;
    }

  private:
    const char *at = nullptr;
    int each = 0;
    int64_t step = 0;
};

// Several pieces of memory, spread evenly over `calls` calls of Lines::ask.
class Ahead {
  public:
    explicit Ahead(int64_t calls) : calls(calls < 1 ? 1 : calls) {}

    template <class Element>
    void add(const Element *start, int64_t count) {
        if (count <= 0) return;
        const int64_t bytes = count * int64_t(sizeof(Element));
        pieces[number++] = {reinterpret_cast<const char *>(start), bytes};
        total += bytes;
    }

    // What to ask for in the next `some` calls.
    Lines next(int64_t some) {
        if (current == number) return Lines();
        const int64_t each = (total + calls * LINE - 1) / (calls * LINE);
        const Lines lines(pieces[current].start + done, each, each * LINE);
        done += some * each * LINE;
        if (done >= pieces[current].bytes) {
            ++current;
            done = 0;
        }
        return lines;
    }

  private:
    struct {
        const char *start;
        int64_t bytes;
    } pieces[8];
    int number = 0, current = 0;
    int64_t calls, total = 0, done = 0;
};
