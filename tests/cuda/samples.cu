// Kernels that try the emulator, some of them wrong on purpose. NVRTC compiles them too, which shows that the
// emulator lets nothing through that CUDA would not.
static_assert(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(float2) == 8, "float vectors");
static_assert(alignof(uint4) == 16 && alignof(uint2) == 8 && sizeof(uint3) == 12, "integer vectors");
static_assert(alignof(uchar4) == 4 && alignof(ushort4) == 8 && alignof(ulonglong2) == 16, "small and large");

#ifndef NAME
#define NAME named_by_a_macro
#endif
extern "C" __global__ void NAME(int* out) { *out = 7; }

__constant__ float table[4] = {0.5f, 1.0f, 2.0f, 4.0f};

struct Span {
  int* data;
  int first, count;
};

template <int factor>
__device__ __forceinline__ int times(int value) {
  return value * factor;
}

extern "C" __global__ void __launch_bounds__(1024)
fill(const Span span, float scale, long long extra, bool odd) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < span.count)
    span.data[span.first + i] = times<3>(i) + int(scale * __ldg(&table[i % 4])) + int(extra) + (odd ? 1 : 0);
}

extern "C" __global__ void indices(uint3* thread, uint3* block, unsigned* sizes) {
  const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = b * blockDim.x * blockDim.y * blockDim.z + t;
  thread[i] = make_uint3(threadIdx.x, threadIdx.y, threadIdx.z);
  block[i] = make_uint3(blockIdx.x, blockIdx.y, blockIdx.z);
  sizes[0] = blockDim.z, sizes[1] = gridDim.z, sizes[2] = warpSize;
}

// ---- threads that wait for each other ----

extern "C" __global__ void shuffles(const int* in, int* out, int width, int operand) {
  const int t = threadIdx.x, value = in[t];
  out[t] = __shfl_sync(0xffffffffu, value, operand, width);
  out[t + 32] = __shfl_xor_sync(0xffffffffu, value, operand, width);
  out[t + 64] = __shfl_up_sync(0xffffffffu, value, operand, width);
  out[t + 96] = __shfl_down_sync(0xffffffffu, value, operand, width);
}

// The two halves of a warp do it apart, each as often as its own number says.
extern "C" __global__ void halves(const unsigned* in, unsigned* out) {
  const unsigned t = threadIdx.x, mask = t < 16 ? 0x0000ffffu : 0xffff0000u, times = t < 16 ? 3 : 5;
  unsigned sum = 0;
  for (unsigned k = 0; k < times; ++k)
    sum += __reduce_max_sync(mask, in[t] + k) + __reduce_add_sync(mask, 1u);
  out[t] = sum;
  out[t + 32] = __ballot_sync(mask, in[t] & 1);
  out[t + 64] = __any_sync(mask, in[t] & 1) * 2 + __all_sync(mask, in[t] & 1);
  out[t + 96] = (unsigned)__reduce_min_sync(mask, -(int)in[t]);
  __syncwarp(mask);
}

template <bool waits>
__device__ void reverse(int* out) {
  __shared__ int line[1024];
  for (int round = 0; round < 3; ++round) {
    line[threadIdx.x] = (int)threadIdx.x * (round + 1);
    if (waits) __syncthreads();
    out[(blockIdx.x * 3 + round) * blockDim.x + threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
    if (waits) __syncthreads();
  }
}
extern "C" __global__ void reverse_with_barriers(int* out) { reverse<true>(out); }
extern "C" __global__ void reverse_with_race(int* out) { reverse<false>(out); }

extern "C" __global__ void turns(unsigned* log, unsigned* count) {
  log[atomicAdd(count, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

template <class T>
__device__ void look(T* before, T* after) {
  __shared__ T word;
  *before = word;
  word = 5;
  *after = word;
}
extern "C" __global__ void look_at_shared(unsigned* out) {
  __shared__ __align__(64) unsigned word[2];
  unsigned* mine = out + 4 * blockIdx.x;
  mine[0] = word[1];
  word[1] = 5;
  mine[1] = word[1];
  look(mine + 2, mine + 3);
}

extern "C" __global__ void missing_lane(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
extern "C" __global__ void missing_thread(int* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
extern "C" __global__ void two_barriers(int* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads(), out[0] = 1;
}
extern "C" __global__ void two_primitives(unsigned* out) {
  out[0] = threadIdx.x < 16 ? __ballot_sync(0xffffffffu, 1) : __reduce_max_sync(0xffffffffu, 1u);
}
extern "C" __global__ void two_places(unsigned* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
  else
    out[threadIdx.x] = __ballot_sync(0xffffffffu, 0);
}
extern "C" __global__ void two_masks(unsigned* out) {
  const unsigned mask = threadIdx.x < 31 ? 0xffffffffu : 0xc0000000u;
  out[threadIdx.x] = __ballot_sync(mask, 1);
}
extern "C" __global__ void mask_without_caller(int* out) {
  out[threadIdx.x] = __shfl_sync(0xfffffffeu, 1, 1);
}
extern "C" __global__ void shuffle_from_outside(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

// ---- arithmetic ----

extern "C" __global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f) {
  const int t = threadIdx.x;
  atomicAdd(i, t), atomicMax(i + 1, t), atomicMin(i + 2, -t), atomicExch(i + 3, t), atomicSub(i + 4, 1);
  atomicAdd(u, 1), atomicMax(u + 1, t), atomicMin(u + 2, t);
  atomicOr(u + 3, 1u << t), atomicAnd(u + 4, ~(1u << t));
  atomicAdd(l, 1ull << 40), atomicMax(l + 1, (unsigned long long)t << 40), atomicXor(l + 2, 1ull << t);
  atomicAdd(f, 0.5f), atomicExch(f + 1, 2.0f);
  if (atomicCAS(u + 5, 0u, 9u) == 0) atomicAdd(i + 5, 1);  // for one thread only
}

extern "C" __global__ void arithmetic(const float* a, const float* b, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = fmaxf(a[i], b[i]), out[n + i] = fminf(a[i], b[i]);
  out[2 * n + i] = max(a[i], b[i]), out[3 * n + i] = __fmul_rn(a[i], 0.5f);
  out[4 * n + i] = __int_as_float(__float2int_rn(a[i])), out[5 * n + i] = a[i] * b[i] + 1.0f;
}

extern "C" __global__ void bits(unsigned a, unsigned b, unsigned* out) {
  out[0] = __popc(a), out[1] = __ffs(a), out[2] = __clz(a), out[3] = __brev(a);
  out[4] = __byte_perm(a, b, 0x7152), out[5] = __byte_perm(a, b, 0x000b);
  out[6] = __funnelshift_l(a, b, 8), out[7] = __funnelshift_r(a, b, 8), out[8] = __umulhi(a, b);
  out[9] = __float_as_uint(__uint_as_float(a)), out[10] = min(a, 5u) + max(3, 4), out[11] = __clz(0);
}

#ifdef CUSIM
extern "C" __global__ void fma_down_up(const float* a, const float* b, const float* c, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = cusim_fma_rd(a[i], b[i], c[i]), out[n + i] = cusim_fma_ru(a[i], b[i], c[i]);
}
#endif

// ---- faults and undefined behaviour ----

extern "C" __global__ void touch(float* data, int index) { data[index] = data[index] + 1.0f; }
extern "C" __global__ void divide(int* out, int a, int b) { *out = a / b; }
extern "C" __global__ void endless(volatile int* out) {
  while (*out == 0) *out = 0;
}
__device__ __noinline__ int deep(int* out, int n) {
  volatile char room[4096];
  room[n & 4095] = 1;
  return n ? deep(out, n - 1) + room[n & 4095] + out[0] : 0;
}
extern "C" __global__ void recurse(int* out, int n) { out[0] = deep(out, n); }
extern "C" __global__ void add(int* out, int a, int b) { *out = a + b; }
extern "C" __global__ void shift(int* out, int a, int b) { *out = a << b; }
extern "C" __global__ void to_integer(int* out, float a) { *out = (int)a; }
extern "C" __global__ void shared_index(int* out, int index) {
  __shared__ int line[8];
  line[index] = 1;
  *out = line[index];
}
extern "C" __global__ void local_index(int* out, int index) {
  int line[8] = {};
  line[index] = 1;
  *out = line[index & 7];
}
extern "C" __global__ void load_vector(const float* in, float* out) {
  *out = reinterpret_cast<const float4*>(in)->y;
}
extern "C" __global__ void assume(int* out, int value) {
  __builtin_assume(value > 0);
  *out = value;
}
