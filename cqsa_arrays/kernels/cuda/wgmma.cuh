// Warpgroup products and the barriers around them, compute capability 9.0: what PTX calls wgmma and mbarrier.
//
// Matrices lie in shared memory as atoms of 64 columns: rows of 128 bytes, the 16-byte word w of row r at place w ^ (r % 8)
// ("128-byte swizzle"), each atom beginning at a multiple of 1024 bytes.
// Sources: PTX ISA, "Asynchronous warpgroup level matrix instructions", "Matrix descriptor" and "mbarrier".
#pragma once
#include "copy.cuh"

constexpr int ATOM = 64;  // columns

// Where element word `word` (16 bytes) of row `row` lies in an atom, in bytes.
__device__ __forceinline__ uint32 swizzled(int row, int word) { return row * 128 + ((word ^ row % 8) << 4); }

// A matrix for the tensor cores; `leading`: bytes from one atom of columns to the next, where a product spans several.
__device__ __forceinline__ unsigned long long matrix_at(uint32 address, uint32 leading) {
    constexpr unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 >> 4;
    return SWIZZLE_128 | EIGHT_ROWS << 32 | static_cast<unsigned long long>(leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}

#if ELEMENT == 0
#define OPERANDS "f16.f16"
#else
#define OPERANDS "bf16.bf16"
#endif
#define LIST16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST32 LIST16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST48 LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST64 LIST48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST96 \
    LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
           ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST128 \
    LIST96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
           ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)
#define SUM16(d) SIXTEEN(d, 0)
#define SUM32(d) SUM16(d), SIXTEEN(d, 16)
#define SUM48(d) SUM32(d), SIXTEEN(d, 32)
#define SUM64(d) SUM48(d), SIXTEEN(d, 48)
#define SUM96(d) SUM64(d), SIXTEEN(d, 64), SIXTEEN(d, 80)
#define SUM128(d) SUM96(d), SIXTEEN(d, 96), SIXTEEN(d, 112)

// sum (64 x N) = or += a (64 x 16) b (N x 16, transposed), both in shared memory with contiguous columns.
template <int N>
struct Product;

#define DEFINE_PRODUCT(N, REGISTERS, A0, A1, A2, A3, A4)                                                                  \
    template <>                                                                                                           \
    struct Product<N> {                                                                                                   \
        __device__ static __forceinline__ void of_shared(float* d, unsigned long long a, unsigned long long b, int add) {    \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, " A2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." OPERANDS \
                         " {" LIST##REGISTERS "}, " A0 ", " A1 ", p, 1, 1, 0, 0; }"                                       \
                         : SUM##REGISTERS(d)                                                                              \
                         : "l"(a), "l"(b), "r"(add));                                                                     \
        }                                                                                                                 \
        __device__ static __forceinline__ void add_of_registers(float* d, const uint32 (&a)[4], unsigned long long b) {             \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." OPERANDS " {" LIST##REGISTERS "}, {" A0 ", " A1 \
                         ", " A2 ", " A3 "}, " A4 ", 1, 1, 1, 1;"                                                         \
                         : SUM##REGISTERS(d)                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
        }                                                                                                                 \
    };
DEFINE_PRODUCT(32, 16, "%16", "%17", "%18", "%19", "%20")
DEFINE_PRODUCT(64, 32, "%32", "%33", "%34", "%35", "%36")
DEFINE_PRODUCT(96, 48, "%48", "%49", "%50", "%51", "%52")
DEFINE_PRODUCT(128, 64, "%64", "%65", "%66", "%67", "%68")
DEFINE_PRODUCT(192, 96, "%96", "%97", "%98", "%99", "%100")
DEFINE_PRODUCT(256, 128, "%128", "%129", "%130", "%131", "%132")

// Registers that were written before are seen by the products that follow.
__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void products_done() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Shared memory that this thread wrote, and whose copies it saw arrive, is seen by products behind the next barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers of shared memory, by address.
__device__ __forceinline__ void barrier_init(uint32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ bool barrier_passed(uint32 barrier, uint32 parity) {
    uint32 passed;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(passed)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return passed;
}
__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
    while (!barrier_passed(barrier, parity)) {}
}
