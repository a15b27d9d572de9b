// fp32 linear layers on AMX tiles; instruction sets without tiles have none of it.
#include "cpu/linear/kernels.h"

#if defined(__AMX_BF16__)
#include "cpu/linear/finish.h"
#include "cpu/linear/multiply.h"
#include "cpu/linear/pack.h"
#include "cpu/memory.h"

namespace beit_fast::linear {
namespace {

// Calls `use` with the number of terms as a constant.
template <class Use>
void with_terms(int64_t terms, Use use) {
    if (terms == 2) return use(std::integral_constant<int, 2>{});
    use(std::integral_constant<int, 3>{});
}

void pack(const Matrix& matrix, int64_t terms, uint32_t* packed, int64_t begin, int64_t end) {
    const int64_t steps = matrix.steps(), panel_words = steps * terms * pair_words;
    with_terms(terms, [&](auto count) {
        for (int64_t panel = begin; panel < end; ++panel) {
            read_pair<count>(packed + panel * panel_words, matrix, panel * pair_side, {0, steps}, true);
        }
    });
}

void split_chunk(const Params& params, const Block& block, uint32_t* to, Steps steps, int64_t begin, int64_t end) {
    Matrix rows = params.left;
    rows.rows = block.last;
    with_terms(params.terms, [&](auto count) {
        for (int64_t pair = begin; pair < end; ++pair) {
            uint32_t* words = to + pair * steps.count() * params.terms * pair_words;
            read_pair<count>(words, rows, block.first + pair * pair_side, steps, false);
        }
    });
}

void split(const Params& params, const Block& block, int64_t begin, int64_t end) {
    const Chunks chunks(params.left);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        const Steps steps = chunks[chunk];
        split_chunk(params, block, block.words_from(params, steps.first), steps, begin, end);
    }
}

// One item: its operands over a chunk of the depth, and the work that is interleaved with the products.
struct Product {
    const uint32_t* left;
    const uint32_t* right;
    int64_t steps;
    float* sums;
    bool continued;  // whether `sums` hold those of the chunks before
    Results& results;
    Prefetch& prefetch;
};

template <int kTerms, bool kBoth>
BEIT_FAST_APART void add_products(const Product& given) {
    using Tiles = Sums<kBoth>;
    if (given.continued) Tiles::load(given.sums);
    else Tiles::zero();
    const int64_t rows_beside = ceil_divide(pair_side, std::max<int64_t>(1, given.steps));
    const uint32_t* left = given.left;
    const uint32_t* right = given.right;
    for (int64_t step = 0; step < given.steps; ++step) {
        Tiles::template add_step<kTerms>(left, right);
        left += kTerms * pair_words;
        right += kTerms * pair_words;
        given.results.write_rows(rows_beside);
        given.prefetch.advance();
    }
    given.results.write_all();
    Tiles::store(given.sums);
}

void add_products(const Product& product, int64_t terms, bool both) {
    with_terms(terms, [&](auto count) {
        if (both) add_products<count, true>(product);
        else add_products<count, false>(product);
    });
}

// Sums of all items over the chunks of the depth; with one chunk, of two items alternately.
class SumsOfItems {
public:
    SumsOfItems(int64_t items, int64_t chunks) : kept_(chunks > 1), sums_((kept_ ? items : 2) * sums_count) {}

    float* operator[](int64_t item) const { return sums_.data() + (kept_ ? item : item % 2) * sums_count; }

private:
    bool kept_;
    AlignedArray<float> sums_;
};

// One chunk of items `begin` to `end`; the last chunk writes the results.
void multiply_chunk(const Params& params, const Block& block, const uint32_t* left, int64_t chunk, int64_t begin,
                    int64_t end, const SumsOfItems& sums) {
    const Chunks chunks(params.left);
    const Steps steps = chunks[chunk];
    const int64_t pairs = block.pairs(), panel_words = chunks.steps * params.terms * pair_words;
    const int64_t chunk_words = steps.count() * params.terms * pair_words;
    Results results(params);
    Prefetch prefetch(nullptr, 0, 1);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t panel = item / pairs, pair = item % pairs;
        const uint32_t* right = params.right + panel * panel_words + steps.first * params.terms * pair_words;
        if (item == begin || pair == 0) {
            const bool last = (panel + 1) * pairs >= end;
            prefetch = {right + panel_words, last ? 0 : chunk_words * 4, std::max<int64_t>(1, pairs * steps.count())};
        }
        const int64_t row = block.first + pair * pair_side, rows = std::min(pair_side, block.last - row);
        float* own = sums[item - begin];
        add_products({left + pair * chunk_words, right, steps.count(), own, chunk > 0, results, prefetch},
                     params.terms, rows > side);
        if (chunk + 1 == chunks.count) results.begin(own, row, rows, panel * pair_side);
    }
    results.write_all();
}

void multiply(const Params& params, const Block& block, int64_t begin, int64_t end) {
    const TileSession session;
    const Chunks chunks(params.left);
    const SumsOfItems sums(end - begin, chunks.count);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        multiply_chunk(params, block, block.words_from(params, chunks[chunk].first), chunk, begin, end, sums);
    }
}

void run(const Params& params, const Block& block) {
    const TileSession session;
    const Chunks chunks(params.left);
    const int64_t items = block.pairs() * params.panels();
    const SumsOfItems sums(items, chunks.count);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        split_chunk(params, block, block.words, chunks[chunk], 0, block.pairs());
        multiply_chunk(params, block, block.words, chunk, 0, items, sums);
    }
}

}  // namespace

static constexpr Kernels kernels_on_tiles = {pack, split, multiply, run};
const Kernels* const BEIT_FAST_ISA::kernels = &kernels_on_tiles;

}  // namespace beit_fast::linear

#else
const beit_fast::linear::Kernels* const beit_fast::linear::BEIT_FAST_ISA::kernels = nullptr;
#endif
