// How a step begins: its table comes as kernel arguments, in chunks, and is put where other kernels read it.
// Needs CHUNK, bytes of a chunk. Arguments are copied when a launch is queued, or captured.
struct Chunk {
  u32 words[CHUNK / 4];
};

extern "C" __global__ void receive(const Chunk chunk, u32* into, i32 count) {
  i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) into[i] = chunk.words[i];
}

extern "C" __global__ void clear(float* x, i64 count) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) x[i] = 0.0f;
}
