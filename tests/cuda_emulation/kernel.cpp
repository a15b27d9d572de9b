#include "cuda/patch_embed/kernel.cuh"
#include "cuda/patch_embed/launch.cuh"
#include "cuda/patch_embed/plan.cuh"

// The launchers of half.cu and single.cu on the emulator, and index arithmetic for tests.
namespace beit_fast::cuda {
namespace {

Arguments emulated;
bool read_vectors;

void allow_reads_of(const Rows& rows, int64_t numbers) {
    if (rows.data != nullptr) emulation::allow_reads(rows.data, numbers * bytes_of(rows.type));
}

template <Arithmetic arithmetic, class Tile>
void run_tiles() {
    emulation::run_blocks(plan_tiles<Tile>(emulated), [] { patch_embed_kernel<arithmetic, Tile>(emulated); });
}

}  // namespace

template <Arithmetic arithmetic>
void launch(Arguments& arguments, bool large, int32_t) {
    emulated = arguments;
    read_vectors = arguments.pixels.vector;
    const int64_t columns = arguments.columns;
    emulation::allow_reads(arguments.weight, columns * arguments.weight_stride);
    for (const Rows& rows : {arguments.bias, arguments.cls, arguments.mask_token}) allow_reads_of(rows, columns);
    if (arguments.mask != nullptr) emulation::allow_reads(arguments.mask, arguments.rows);
    const int64_t patches = arguments.pixels.patches.value;
    const int64_t tokens = patches + (arguments.cls.data != nullptr);
    allow_reads_of(arguments.positions, columns * tokens);
    emulation::expect_writes(arguments.out, arguments.rows / patches * tokens * columns * bytes_of(arguments.out_type));
    return large ? run_tiles<arithmetic, LargeTile>() : run_tiles<arithmetic, SmallTile>();
}

template void launch<Arithmetic::kFloat16>(Arguments&, bool, int32_t);
template void launch<Arithmetic::kBFloat16>(Arguments&, bool, int32_t);
template void launch<Arithmetic::kTensorFloat32>(Arguments&, bool, int32_t);
template void launch<Arithmetic::kFloat32>(Arguments&, bool, int32_t);

BEIT_FAST_EXPORT bool last_read_vectors() { return read_vectors; }
// Byte offset of depth k of a patch, in the order that follows from the strides (in bytes).
BEIT_FAST_EXPORT int64_t pixel_offset(const int64_t* sizes, const int64_t* strides, const int64_t* patch_size,
                                      int64_t image, uint32_t patch, uint32_t k) {
    Call call{};
    for (int i = 0; i < 4; ++i) call.sizes[i] = sizes[i], call.strides[i] = strides[i];
    call.patch_height = patch_size[0], call.patch_width = patch_size[1];
    const Pixels pixels = plan_pixels(call, 8);
    return pixels.row_offset(image, patch) + pixels.depth_offset(k);
}

BEIT_FAST_EXPORT uint32_t quotient(uint32_t n, int64_t divisor) { return make_divisor(divisor).quotient(n); }
BEIT_FAST_EXPORT uint32_t place_of(bool of_weights, uint32_t row, uint32_t chunk) {
    return of_weights ? weight_place(row, chunk) : pixel_place(row, chunk);
}
BEIT_FAST_EXPORT uint32_t column_of(uint32_t product, uint32_t n) { return fragment_column(product, n); }

}  // namespace beit_fast::cuda
