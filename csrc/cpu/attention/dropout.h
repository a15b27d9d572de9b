// Dropout of attention weights: Philox4x32-10 (Salmon et al., SC 2011) with counter (query, key, b * H + h, 0) and the
// seed as key. All kernels of the operator have the same masks.
#pragma once

#include "cpu/simd.h"

namespace beit_fast {
namespace {

class Dropout {
public:
    Dropout(double probability, uint64_t seed)
        : seed_(seed),
          threshold_(static_cast<uint32_t>(probability * 2147483648.0)),
          active_(probability > 0.0),
          kept_scale_(1.0 / (1.0 - probability)) {}

    bool active() const { return active_; }

    // Factors for the weights of `count` queries: 1 / (1 - p) or 0.
    template <class T>
    void factors(T* to, const uint32_t* queries, int count, uint32_t key, uint32_t plane) const {
        for (int i = 0; i < count; ++i) {
            to[i] = (first_word(queries[i], key, plane) >> 1) >= threshold_ ? static_cast<T>(kept_scale_) : T(0);
        }
    }

private:
    uint32_t first_word(uint32_t c0, uint32_t c1, uint32_t c2) const {
        uint32_t c3 = 0, key_low = static_cast<uint32_t>(seed_), key_high = static_cast<uint32_t>(seed_ >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u;
            const uint64_t second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
            c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ key_low;
            c1 = static_cast<uint32_t>(second);
            c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ key_high;
            c3 = static_cast<uint32_t>(first);
            key_low += 0x9E3779B9u;
            key_high += 0xBB67AE85u;
        }
        return c0;
    }

    uint64_t seed_;
    uint32_t threshold_;
    bool active_;
    double kept_scale_;
};

}  // namespace
}  // namespace beit_fast
