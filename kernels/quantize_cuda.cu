// Keys and values straight into the records of a FragmentHistory; the rules of coding are those of encode.py, the order of bytes that of
// fragments.py. A block makes one record. A warp has 16 channels of keys or 32 of values, and each lane the elements whose fields lie in
// its words, so that nothing but sums and extremes crosses lanes.
//
// Compile-time constants: those of attend_cuda.cu that describe a history, and
//   STATES       type of keys and values: 0 half, 1 bfloat16, 2 float
//   NORMAL_KIND, VALUE_KIND   how 1-bit channels of keys, and values, are coded, a `Kind` below
//   MAPPED_FROM  first key channel that goes through a matrix, a multiple of 16; WIDTH: none does

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Kind { MINIMUM_2, MINIMUM_1, MEAN, CENTRED, NONE, TERNARY };

constexpr int NARROW_STEPS = KEY_STEPS - WIDE_STEPS;
constexpr int NARROW_PAIRS = NARROW_STEPS / 2;
constexpr int TILES = WIDTH / 16;
constexpr int RECORD_TOKENS = 32 * CHUNKS;
constexpr int KEY_CODES = WIDE_STEPS * 128 + NARROW_STEPS * 64;
constexpr int KEY_SCALES = (KEY_STEPS + 1) / 2 * 32;
constexpr int KEY_METADATA = KEY_SCALES + STORED_STEPS * 16;  // halves
constexpr int KEY_RECORD = CHUNKS * KEY_CODES + KEY_METADATA * 2;
constexpr int VALUE_CODES = TILES * 64 * VALUE_BITS;
constexpr int VALUE_METADATA = VALUE_SCALE == 1 ? WIDTH * 2 : VALUE_SCALE == 2 ? WIDTH * 2 * CHUNKS : 0;
constexpr int VALUE_RECORD = CHUNKS * VALUE_CODES + VALUE_METADATA * (VALUE_STORED ? 2 : 1);

constexpr int STATE_BYTES = STATES == 2 ? 4 : 2;
constexpr int PIECE = 16 / STATE_BYTES;  // channels that are loaded at once
constexpr int PIECES = WIDTH / PIECE;    // of a token
// Words of a token in shared memory: lanes of a fragment, 8 tokens x 4 pairs of channels, hit different banks.
constexpr int ROW = WIDTH * STATE_BYTES / 4 + (STATES == 2 ? 8 : 4);
constexpr int KEY_THREADS = 32 * KEY_STEPS;
constexpr int VALUE_THREADS = WIDTH;
constexpr int RANGE_THREADS = 256, RANGE_TOKENS = 128;

// The matrix is a sum of numbers in half precision, times MATRIX_UNIT in the case of half, so that the second one is not subnormal.
// Float states are split likewise. Terms below 2^-24 of the first one are left out.
constexpr int MATRIX_PARTS = STATES == 0 ? 2 : 3, STATE_PARTS = STATES == 2 ? 3 : 1;
constexpr float MATRIX_UNIT = STATES == 0 ? 256.f : 1.f;

// Bits of `faults`: something was NaN or infinite, or metadata are beyond half precision.
constexpr int KEY_STATES = 1, KEY_RANGE = 2, VALUE_STATES = 4, VALUE_RANGE = 8;

static_assert(CHANNELS == WIDTH && KEY_STEPS * 16 == WIDTH, "all channels of a key are stored");
static_assert(MAPPED_FROM % 16 == 0 && MAPPED_FROM <= WIDTH, "fragments are mapped as a whole");

struct States {       // [B, H, T, WIDTH]
  const u8* data;
  i64 batch, head, token;  // strides in bytes
  const int* begin;        // of each sequence, the first token to take; null: 0
  const int* count;        // and how many; null: all
  int tokens;
};

__device__ __forceinline__ u16 to_half(float x) {
  u16 h;
  asm("{ .reg .f16 t; cvt.rn.f16.f32 t, %1; mov.b16 %0, t; }" : "=h"(h) : "f"(x));
  return h;
}
__device__ __forceinline__ float from_half(u32 h) {
  float x;
  asm("{ .reg .f16 t; mov.b16 t, %1; cvt.f32.f16 %0, t; }" : "=f"(x) : "h"((u16)h));
  return x;
}
__device__ __forceinline__ u32 pack_brain(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if STATES == 0
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The lower and the upper state of a word; a float is a word of its own.
__device__ __forceinline__ float low_state(u32 word) { return STATES == 0 ? from_half(word & 0xffffu) : __uint_as_float(word << 16); }
__device__ __forceinline__ float high_state(u32 word) { return STATES == 0 ? from_half(word >> 16) : __uint_as_float(word & 0xffff0000u); }

// Not zero if a state in this word is not finite.
__device__ __forceinline__ u32 not_finite(u32 word) {
  if (STATES == 0) return ((word & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
  if (STATES == 1) return ((word & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
  return ((word & 0x7f800000u) + 0x00800000u) & 0x80000000u;
}
__device__ __forceinline__ u32 not_finite(uint4 piece) {
  return not_finite(piece.x) | not_finite(piece.y) | not_finite(piece.z) | not_finite(piece.w);
}

__device__ __forceinline__ int begin_of(const States& states, int batch) { return states.begin ? states.begin[batch] : 0; }
__device__ __forceinline__ int count_of(const States& states, int batch) { return states.count ? states.count[batch] : states.tokens; }
__device__ __forceinline__ const u8* row_of(const States& states, int batch, int head, int token) {
  return states.data + batch * states.batch + head * states.head + (i64)(begin_of(states, batch) + token) * states.token;
}

// Where the word of lane `lane` of fragment `step` of `steps` lies, in words: fragments in fours, then two, then one.
__device__ __forceinline__ int lane_word(int step, int steps, int lane) {
  const int whole = steps / 4 * 4;
  if (step < whole) return (step / 4 * 32 + lane) * 4 + step % 4;
  const int left = steps - whole, at = step - whole;
  if (left >= 2 && at < 2) return whole * 32 + lane * 2 + at;
  return (steps - 1) * 32 + lane;
}
// The inverse: step * 32 + lane.
__device__ __forceinline__ u32 word_lane(u32 at, u32 steps) {
  const u32 whole = steps / 4 * 4, left = steps - whole, rest = at - whole * 32;
  if (at < whole * 32) return (at / 128 * 4 + at % 4) * 32 + at / 4 % 32;
  if (left >= 2 && rest < 64) return (whole + rest % 2) * 32 + rest / 2;
  return (steps - 1) * 32 + rest % 32;
}

// The same in all lanes, which the compiler would not know of threadIdx.x / 32.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, (int)threadIdx.x / 32, 0); }

struct Add { __device__ __forceinline__ float operator()(float a, float b) const { return a + b; } };
struct Least { __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); } };
struct Most { __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); } };

// Combine N numbers over LANES lanes that lie FIRST apart, N <= LANES, powers of two: the lane `owner` returns the number of that index.
template <int N, int FIRST, int LANES, class Combine>
__device__ __forceinline__ float over_lanes(float (&x)[N], Combine combine) {
  int left = N;
#pragma unroll
  for (int distance = FIRST; distance < FIRST * LANES; distance *= 2) {
    if (left > 1) {
      left /= 2;
      const bool is_odd = threadIdx.x & distance;
#pragma unroll
      for (int i = 0; i < left; i++) {
        const float kept = is_odd ? x[2 * i + 1] : x[2 * i], given = is_odd ? x[2 * i] : x[2 * i + 1];
        x[i] = combine(kept, __shfl_xor_sync(~0u, given, distance));
      }
    } else {
      x[0] = combine(x[0], __shfl_xor_sync(~0u, x[0], distance));
    }
  }
  return x[0];
}
template <int N, int FIRST> __device__ __forceinline__ int owner() { return (threadIdx.x / FIRST) & (N - 1); }
// What the lane that owns number n holds.
template <int N, int FIRST, class T> __device__ __forceinline__ T from_owner(T x, int n) {
  return __shfl_sync(~0u, x, (int)(threadIdx.x & 31 & ~((N - 1) * FIRST)) | n * FIRST);
}

// Code N groups, of each of which LANES lanes hold M numbers. Place says in which word, and at which bit, the code of number m of
// group n goes; words are zeros at first.
struct Metadata { u16 scale, offset; };  // of the group that this lane owns
template <int KIND, int N, int FIRST, int LANES, int M, class Place>
__device__ __forceinline__ Metadata encode(float (&x)[N][M], u32* words, float threshold) {
  constexpr float SHARE = 1.f / (LANES * M);
  Metadata metadata = {0, 0};
  float sums[N];
#pragma unroll
  for (int n = 0; n < N; n++) sums[n] = 0.f;
  if constexpr (KIND == MINIMUM_2 || KIND == MINIMUM_1) {
    float low[N], high[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
      low[n] = high[n] = x[n][0];
#pragma unroll
      for (int m = 1; m < M; m++) low[n] = fminf(low[n], x[n][m]), high[n] = fmaxf(high[n], x[n][m]);
    }
    const float least = over_lanes<N, FIRST, LANES>(low, Least()), most = over_lanes<N, FIRST, LANES>(high, Most());
    metadata.scale = to_half(KIND == MINIMUM_2 ? (most - least) / 3.f : most - least);
    metadata.offset = to_half(least);
    const u32 both = metadata.scale | (u32)metadata.offset << 16;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const u32 own = from_owner<N, FIRST>(both, n);
      float step = from_half(own & 0xffffu);
      const float offset = from_half(own >> 16);
      if (step == 0.f) step = 1.f;  // a constant group: all its codes mean the offset
      // Halves go to the even code. These multiples of a half-precision number are exact.
#pragma unroll
      for (int m = 0; m < M; m++) {
        const float above = x[n][m] - offset;
        float limit = 0.5f * step;
        if (KIND == MINIMUM_2 && above >= 1.5f * step) limit = 2.5f * step, words[Place::word(n, m)] |= 2u << Place::bit(n, m);
        if (above > limit) words[Place::word(n, m)] |= 1u << Place::bit(n, m);
      }
    }
  } else if constexpr (KIND == TERNARY) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int m = 0; m < M; m++) sums[n] += fabsf(x[n][m]);
    }
    const float limit = threshold * (over_lanes<N, FIRST, LANES>(sums, Add()) * SHARE);
    float counts[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float own = from_owner<N, FIRST>(limit, n);
      sums[n] = counts[n] = 0.f;
#pragma unroll
      for (int m = 0; m < M; m++) {
        const bool is_zero = !(fabsf(x[n][m]) > own);
        if (is_zero) words[Place::word(n, m)] |= 1u << Place::bit(n, m);
        else sums[n] += fabsf(x[n][m]), counts[n] += 1.f;
        if (x[n][m] > own) words[Place::word(n, m)] |= 2u << Place::bit(n, m);
      }
    }
    if (VALUE_SCALE) {
      const float sum = over_lanes<N, FIRST, LANES>(sums, Add()), count = over_lanes<N, FIRST, LANES>(counts, Add());
      metadata.scale = to_half(sum / fmaxf(count, 1.f));
    }
  } else {
    if constexpr (KIND == MEAN) {
#pragma unroll
      for (int n = 0; n < N; n++) {
#pragma unroll
        for (int m = 0; m < M; m++) sums[n] += x[n][m];
      }
      metadata.offset = to_half(over_lanes<N, FIRST, LANES>(sums, Add()) * SHARE);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float mean = from_half(from_owner<N, FIRST>((u32)metadata.offset, n));
        sums[n] = 0.f;
#pragma unroll
        for (int m = 0; m < M; m++) x[n][m] -= mean;
      }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        sums[n] += fabsf(x[n][m]);
        if (x[n][m] >= 0.f) words[Place::word(n, m)] |= 1u << Place::bit(n, m);
      }
    }
    metadata.scale = to_half(over_lanes<N, FIRST, LANES>(sums, Add()) * SHARE);
    // Levels are a scale apart: twice the mean size where they lie on both sides of the middle.
    if (KIND != NONE) metadata.scale = to_half(2.f * from_half(metadata.scale));
  }
  return metadata;
}

__device__ __forceinline__ bool is_beyond_half(u16 half) { return (half & 0x7c00) == 0x7c00; }

// A block's part of the largest scale and of what went wrong.
__device__ __forceinline__ void report(u32 scale, int found, float* scale_max, int* faults) {
  __shared__ u32 scales[32];
  const u32 largest = __reduce_max_sync(~0u, scale);  // halves from zero on are ordered as their bits
  if ((threadIdx.x & 31) == 0) scales[threadIdx.x / 32] = largest;
  if (found) atomicOr(faults, found);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const u32 all = __reduce_max_sync(~0u, threadIdx.x < blockDim.x / 32 ? scales[threadIdx.x] : 0u);
  const float value = from_half(all);
  // Most blocks raise nothing, and need not queue for it.
  if (threadIdx.x == 0 && value > *(volatile float*)scale_max) atomicMax((int*)scale_max, __float_as_int(value));
}

// Floats as numbers in the same order, 0 standing for none.
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 x) { return __uint_as_float(x >> 31 ? x & 0x7fffffffu : ~x); }

// Order of channels: blocks find the extremes of their tokens, and the last one of a sequence ranks. Blocks: tokens, heads, sequences.
// `scratch` is, for each sequence, the largest values of all channels, of their negatives, and a counter: zeros, as which it is left.
extern "C" __global__ void __launch_bounds__(RANGE_THREADS) choose_channels(States states, int wide_channels, u32* scratch, u8* order) {
  constexpr int TOKENS = RANGE_THREADS / PIECES, ROUNDS = RANGE_TOKENS / TOKENS, WARPS = RANGE_THREADS / 32;
  __shared__ float extremes[WARPS][2][WIDTH];
  __shared__ bool is_last;
  const int batch = blockIdx.z, thread = threadIdx.x, piece = thread % PIECES, first = blockIdx.x * RANGE_TOKENS;
  const int count = count_of(states, batch);
  scratch += batch * (2 * WIDTH + 1);
  if (first < count) {
    float high[PIECE], low[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; i++) high[i] = __int_as_float(0xff800000), low[i] = __int_as_float(0x7f800000);
    const u8* const row = row_of(states, batch, blockIdx.y, 0) + piece * 16;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      // Tokens beyond the last one read it again.
      const int token = min(first + round * TOKENS + thread / PIECES, count - 1);
      const uint4 read = *reinterpret_cast<const uint4*>(row + token * states.token);
      const u32 words[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        const u32 word = words[STATES == 2 ? i : i / 2];
        const float state = STATES == 2 ? __uint_as_float(word) : i % 2 ? high_state(word) : low_state(word);
        high[i] = fmaxf(high[i], state), low[i] = fminf(low[i], state);
      }
    }
#pragma unroll
    for (int distance = PIECES; distance < 32; distance *= 2) {
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], distance));
        low[i] = fminf(low[i], __shfl_xor_sync(~0u, low[i], distance));
      }
    }
    if (thread % 32 < PIECES) {
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        extremes[thread / 32][0][piece * PIECE + i] = high[i];
        extremes[thread / 32][1][piece * PIECE + i] = -low[i];
      }
    }
    __syncthreads();
    if (thread < 2 * WIDTH) {
      float most = extremes[0][0][thread];
#pragma unroll
      for (int warp = 1; warp < WARPS; warp++) most = fmaxf(most, extremes[warp][0][thread]);
      atomicMax(scratch + thread, ordered(most));
    }
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicAdd(scratch + 2 * WIDTH, 1u) == gridDim.x * gridDim.y - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  // Widths are not negative, so their bits are in their order; NaN has a place as well, that the order be one of channels in any case.
  u32* const widths = reinterpret_cast<u32*>(extremes);
  __shared__ u32 wide_in_warp[WIDTH / 32];
  u32 width = 0;
  if (thread < WIDTH) {
    const u32 most = *(volatile u32*)(scratch + thread), least = *(volatile u32*)(scratch + WIDTH + thread);
    if (most) width = __float_as_uint(unordered(most) + unordered(least)) & 0x7fffffffu;
    widths[thread] = width;
    scratch[thread] = scratch[WIDTH + thread] = 0;
    if (thread == 0) scratch[2 * WIDTH] = 0;
  }
  __syncthreads();
  bool is_wide = false;
  u32 wide = 0;
  if (thread < WIDTH) {
    int wider = 0;
#pragma unroll 16
    for (int other = 0; other < WIDTH; other++) wider += widths[other] > width || (widths[other] == width && other < thread);
    is_wide = wider < wide_channels;
    wide = __ballot_sync(~0u, is_wide);
    if (thread % 32 == 0) wide_in_warp[thread / 32] = __popc(wide);
  }
  __syncthreads();
  if (thread >= WIDTH) return;
  int before = __popc(wide & ((1u << thread % 32) - 1));
  for (int warp = 0; warp < thread / 32; warp++) before += wide_in_warp[warp];
  order[batch * WIDTH + (is_wide ? before : wide_channels + thread - before)] = thread;
}

// Fragments of a record in shared memory: words in fields of 2 bits, and metadata in the order of a record.
struct KeyFragments {
  u32 fields[CHUNKS][KEY_STEPS][32];
  u16 metadata[KEY_METADATA];
};

// Word `at` of the codes of 32 tokens.
__device__ __forceinline__ u32 key_word(const u32 (&fields)[KEY_STEPS][32], u32 at) {
  const u32* const flat = &fields[0][0];
  if (at < WIDE_STEPS * 32) return flat[word_lane(at, WIDE_STEPS)];
  const u32* const narrow = flat + WIDE_STEPS * 32;
  at -= WIDE_STEPS * 32;
  if (at < NARROW_PAIRS * 32) {
    const u32 place = word_lane(at, NARROW_PAIRS), lane = place % 32;
    return narrow[(place - lane) * 2 + lane] | narrow[(place - lane) * 2 + 32 + lane] << 1;
  }
  // The last one fills halves of words, those of two lanes: from bits 16 e + 8 m to 8 e + m.
  const u32* const last = narrow + NARROW_PAIRS * 64 + (at - NARROW_PAIRS * 32) * 2;
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 folded = (last[i] | last[i] >> 7) & 0x00ff00ffu;
    word |= (folded & 0xffu | folded >> 8) << 16 * i;
  }
  return word;
}

// What a warp has of 16 channels: for each (m of 2 CHUNKS, kh) the elements (rr, e), as the matrix units give them.
typedef float Fragment[2 * CHUNKS][2][4];

__device__ __forceinline__ void read_fragment(const u32* tile, int step, Fragment& fragment) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < 2 * CHUNKS; m++) {
#pragma unroll
    for (int kh = 0; kh < 2; kh++) {
#pragma unroll
      for (int rr = 0; rr < 2; rr++) {
        const u32* const row = tile + (16 * m + 8 * rr + g) * ROW;
        if (STATES == 2) {
          const float2 pair = *reinterpret_cast<const float2*>(row + 16 * step + 8 * kh + 2 * t);
          fragment[m][kh][2 * rr] = pair.x, fragment[m][kh][2 * rr + 1] = pair.y;
        } else {
          const u32 word = row[8 * step + 4 * kh + t];
          fragment[m][kh][2 * rr] = low_state(word), fragment[m][kh][2 * rr + 1] = high_state(word);
        }
      }
    }
  }
}

// 16 channels of the tile's channels from MAPPED_FROM on times the matrix, whose fragments lie lane after lane.
__device__ __forceinline__ void map_fragment(const u32* tile, const uint4* matrix, int step, Fragment& fragment) {
  constexpr int DEPTH = (WIDTH - MAPPED_FROM) / 16;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < 2 * CHUNKS; m++) {
#pragma unroll
    for (int i = 0; i < 8; i++) fragment[m][i / 4][i % 4] = 0.f;
  }
  matrix += (step - MAPPED_FROM / 16) * DEPTH * MATRIX_PARTS * 32 + lane;
#pragma unroll 4
  for (int k = 0; k < DEPTH; k++) {
    uint4 columns[MATRIX_PARTS];
#pragma unroll
    for (int part = 0; part < MATRIX_PARTS; part++) columns[part] = matrix[(k * MATRIX_PARTS + part) * 32];
#pragma unroll
    for (int m = 0; m < 2 * CHUNKS; m++) {
      u32 rows[STATE_PARTS][4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32* const row = tile + (16 * m + 8 * (i & 1) + g) * ROW;
        const int channel = MAPPED_FROM + 16 * k + 8 * (i >> 1) + 2 * t;
        if (STATES == 2) {
          float2 pair = *reinterpret_cast<const float2*>(row + channel);
#pragma unroll
          for (int part = 0; part < STATE_PARTS; part++) {
            rows[part][i] = pack_brain(pair.x, pair.y);
            pair.x -= low_state(rows[part][i]), pair.y -= high_state(rows[part][i]);
          }
        } else {
          rows[0][i] = row[channel / 2];
        }
      }
      // Small terms first.
#pragma unroll
      for (int sum = MATRIX_PARTS - 1; sum >= 0; sum--) {
#pragma unroll
        for (int part = 0; part < STATE_PARTS && part <= sum; part++) {
          multiply(fragment[m][0], rows[part], columns[sum - part].x, columns[sum - part].y);
          multiply(fragment[m][1], rows[part], columns[sum - part].z, columns[sum - part].w);
        }
      }
    }
  }
  if (MATRIX_UNIT != 1.f) {
#pragma unroll
    for (int m = 0; m < 2 * CHUNKS; m++) {
#pragma unroll
      for (int i = 0; i < 8; i++) fragment[m][i / 4][i % 4] *= 1.f / MATRIX_UNIT;
    }
  }
}

struct KeyPlace {  // n: kh and e; m: chunk, m and rr
  static __device__ constexpr int word(int n, int m) { return m / 4; }
  static __device__ constexpr int bit(int n, int m) { return 16 * (n & 1) + 8 * (m >> 1 & 1) + 4 * (m & 1) + 2 * (n >> 1); }
};

// Code a fragment into shared memory; return what went wrong, and raise `scale` to the largest one.
__device__ __forceinline__ int code_fragment(const Fragment& fragment, int step, KeyFragments& out, u32& scale) {
  constexpr int M = 4 * CHUNKS;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const bool has_wide = 16 * step < WIDE_CHANNELS, has_normal = 16 * step + 16 > WIDE_CHANNELS;
  u32 words[CHUNKS] = {};
  Metadata metadata = {0, 0};
  auto is_wide = [&](int n) { return 16 * step + 8 * (n >> 1) + 2 * t + (n & 1) < WIDE_CHANNELS; };
  auto copy = [&](float (&x)[4][M]) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
      for (int m = 0; m < M; m++) x[n][m] = fragment[m / 2][n >> 1][2 * (m & 1) + (n & 1)];
    }
  };
  if (WIDE_CHANNELS && has_wide) {
    float x[4][M];
    copy(x);
    metadata = encode<MINIMUM_2, 4, 4, 8, M, KeyPlace>(x, words, 0.f);
  }
  if (WIDE_CHANNELS < WIDTH && has_normal) {
    float x[4][M];
    u32 normal[CHUNKS] = {}, taken = ~0u;
    copy(x);
    const Metadata found = encode<NORMAL_KIND, 4, 4, 8, M, KeyPlace>(x, normal, 0.f);
    if (WIDE_CHANNELS % 16 && has_wide) {
#pragma unroll
      for (int n = 0; n < 4; n++) {
        if (is_wide(n)) taken &= ~(0x3333u << KeyPlace::bit(n, 0));
      }
    }
    if (!(WIDE_CHANNELS % 16 && has_wide && is_wide(owner<4, 4>()))) metadata = found;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) words[chunk] = words[chunk] & ~taken | normal[chunk] & taken;
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) out.fields[chunk][step][lane] = words[chunk];
  if (g < 4) {
    const int place = step / 2 * 32 + t * 8 + step % 2 * 4 + g;
    out.metadata[place] = metadata.scale;
    const bool is_single = STORED_STEPS % 2 && step == STORED_STEPS - 1;
    if (step < STORED_STEPS) out.metadata[KEY_SCALES + (is_single ? step * 16 + t * 4 + g : place)] = metadata.offset;
  }
  scale = max(scale, (u32)metadata.scale);
  return is_beyond_half(metadata.scale) || is_beyond_half(metadata.offset) ? KEY_RANGE : 0;
}

// Records of sequence b go behind its first `starts[b]` tokens. Blocks: records, heads, sequences. `order` may be null.
extern "C" __global__ void __launch_bounds__(KEY_THREADS) quantize_keys(
    States states, const u8* order, i64 order_batch, i64 order_head, const uint4* matrix, const int* starts, u8* records, i64 capacity,
    float* scale_max, int* faults) {
  constexpr int LOADS = RECORD_TOKENS * PIECES / KEY_THREADS, TOKENS = KEY_THREADS / PIECES;
  extern __shared__ uint4 shared[];
  __shared__ __align__(16) u16 places[WIDTH];
  __shared__ KeyFragments fragments;
  u32* const tile = reinterpret_cast<u32*>(shared);
  const int record = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, thread = threadIdx.x, step = warp_index();
  if ((record + 1) * RECORD_TOKENS > count_of(states, batch)) return;
  const int piece = thread % PIECES, first = thread / PIECES;
  const u8* const row = row_of(states, batch, head, record * RECORD_TOKENS + first) + piece * 16;
  uint4 pieces[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; i++) pieces[i] = *reinterpret_cast<const uint4*>(row + i * TOKENS * states.token);
  u32 bad = 0;
  if (order) {
    if (thread < WIDTH) places[order[batch * order_batch + head * order_head + thread]] = thread;
    __syncthreads();
    int own[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; i++) own[i] = places[piece * PIECE + i];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const u32 words[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
      u32* const at = tile + (first + i * TOKENS) * ROW;
      bad |= not_finite(pieces[i]);
#pragma unroll
      for (int k = 0; k < PIECE; k++) {
        if (STATES == 2) at[own[k]] = words[k % 4];
        else reinterpret_cast<u16*>(at)[own[k]] = (u16)(words[k / 2] >> 16 * (k & 1));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      bad |= not_finite(pieces[i]);
      reinterpret_cast<uint4*>(tile + (first + i * TOKENS) * ROW)[piece] = pieces[i];
    }
  }
  __syncthreads();

  Fragment fragment;
  if (16 * step < MAPPED_FROM) read_fragment(tile, step, fragment);
  else map_fragment(tile, matrix, step, fragment);
  u32 scale = 0;
  const int found = code_fragment(fragment, step, fragments, scale) | (bad ? KEY_STATES : 0);
  const i64 bh = (i64)batch * gridDim.y + head;
  report(scale, found, scale_max + bh, faults);

  u32* const out = reinterpret_cast<u32*>(records + (bh * capacity + starts[batch] / RECORD_TOKENS + record) * KEY_RECORD);
#pragma unroll
  for (u32 from = 0; from < KEY_RECORD / 4; from += KEY_THREADS) {
    const u32 i = from + threadIdx.x, codes = CHUNKS * KEY_CODES / 4;
    if (i < codes) out[i] = key_word(fragments.fields[i / (KEY_CODES / 4)], i % (KEY_CODES / 4));
    else if (i < KEY_RECORD / 4) out[i] = reinterpret_cast<const u32*>(fragments.metadata)[i - codes];
  }
}

// The elements of 32 channels and 32 tokens whose fields a lane holds, as [m * 4 + kh * 2 + e][tile * 2 + rr]: `row` is that of token 0.
// Lanes g and g ^ 1 have the even and the odd ones of the same 8 channels. Each loads all 8 of every other token, and they exchange.
__device__ __forceinline__ u32 read_values(const u8* row, i64 stride, float (&x)[8][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, parity = g & 1;
  const u8* const own = row + (2 * t + parity) * stride + 8 * (g >> 1) * STATE_BYTES;
  u32 bad = 0;
#if STATES == 2
  uint4 pieces[4][2];
#pragma unroll
  for (int k = 0; k < 8; k++) pieces[k / 2][k % 2] = reinterpret_cast<const uint4*>(own + k / 2 * 8 * stride)[k % 2];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    bad |= not_finite(pieces[k][0]) | not_finite(pieces[k][1]);
    const u32 words[8] = {pieces[k][0].x, pieces[k][0].y, pieces[k][0].z, pieces[k][0].w,
                          pieces[k][1].x, pieces[k][1].y, pieces[k][1].z, pieces[k][1].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 kept = parity ? words[2 * i + 1] : words[2 * i], given = parity ? words[2 * i] : words[2 * i + 1];
      const u32 taken = __shfl_xor_sync(~0u, given, 4);
      x[2 * k][i] = __uint_as_float(parity ? taken : kept);
      x[2 * k + 1][i] = __uint_as_float(parity ? kept : taken);
    }
  }
#else
  uint4 pieces[4];
#pragma unroll
  for (int k = 0; k < 4; k++) pieces[k] = *reinterpret_cast<const uint4*>(own + k * 8 * stride);
  const u32 kept_bytes = parity ? 0x7632u : 0x5410u, given_bytes = parity ? 0x5410u : 0x7632u;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    bad |= not_finite(pieces[k]);
    const u32 words[4] = {pieces[k].x, pieces[k].y, pieces[k].z, pieces[k].w};
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const u32 kept = __byte_perm(words[2 * tile], words[2 * tile + 1], kept_bytes);
      const u32 taken = __shfl_xor_sync(~0u, __byte_perm(words[2 * tile], words[2 * tile + 1], given_bytes), 4);
      const u32 even = parity ? taken : kept, odd = parity ? kept : taken;
      x[2 * k][2 * tile] = low_state(even), x[2 * k][2 * tile + 1] = high_state(even);
      x[2 * k + 1][2 * tile] = low_state(odd), x[2 * k + 1][2 * tile + 1] = high_state(odd);
    }
  }
#endif
  return bad;
}

struct ChannelPlace {  // n: tile and rr; m: chunk, m, kh and e
  static __device__ constexpr int word(int n, int m) { return m / 8 * 2 + (n >> 1); }
  static __device__ constexpr int bit(int n, int m) { return 16 * (m & 1) + 8 * (m >> 2 & 1) + 4 * (n & 1) + 2 * (m >> 1 & 1); }
};
struct TokenPlace {  // the other way round, for one chunk
  static __device__ constexpr int word(int n, int m) { return ChannelPlace::word(m, n); }
  static __device__ constexpr int bit(int n, int m) { return ChannelPlace::bit(m, n); }
};

// As `quantize_keys`.
extern "C" __global__ void __launch_bounds__(VALUE_THREADS) quantize_values(
    States states, float threshold, const int* starts, u8* records, i64 capacity, float* scale_max, int* faults) {
  constexpr int WORDS = TILES * VALUE_BITS / 2;
  const int record = blockIdx.x, head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int j = warp_index();
  if ((record + 1) * RECORD_TOKENS > count_of(states, batch)) return;
  const i64 bh = (i64)batch * gridDim.y + head;
  u8* const out = records + (bh * capacity + starts[batch] / RECORD_TOKENS + record) * VALUE_RECORD;
  u16* const scales = reinterpret_cast<u16*>(out + CHUNKS * VALUE_CODES);
  u16* const offsets = scales + VALUE_METADATA / 2;
  const u8* const row = row_of(states, batch, head, record * RECORD_TOKENS) + 32 * j * STATE_BYTES;
  u32 bad = 0, scale = 0, words[2 * CHUNKS] = {};
  bool is_beyond = false;
  auto keep = [&](Metadata metadata, int place) {
    if (VALUE_SCALE) scales[place] = metadata.scale;
    if (VALUE_STORED) offsets[place] = metadata.offset;
    is_beyond |= is_beyond_half(metadata.scale) || is_beyond_half(metadata.offset);
    scale = max(scale, (u32)metadata.scale);
  };
  if constexpr (VALUE_SCALE == 2) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      float x[8][4];
      bad |= read_values(row + chunk * 32 * states.token, states.token, x);
      const Metadata metadata = encode<VALUE_KIND, 8, 4, 8, 4, TokenPlace>(x, words + 2 * chunk, threshold);
      keep(metadata, chunk * WIDTH + j * 32 + t * 8 + owner<8, 4>());
    }
  } else {
    float x[4][8 * CHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      float part[8][4];
      bad |= read_values(row + chunk * 32 * states.token, states.token, part);
#pragma unroll
      for (int k = 0; k < 32; k++) x[k % 4][8 * chunk + k / 4] = part[k / 4][k % 4];
    }
    keep(encode<VALUE_KIND, 4, 1, 4, 8 * CHUNKS, ChannelPlace>(x, words, threshold), g * (2 * TILES) + j * 4 + owner<4, 1>());
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    u32* const to = reinterpret_cast<u32*>(out + chunk * VALUE_CODES);
    const u32 first = words[2 * chunk], second = words[2 * chunk + 1];
    if (VALUE_BITS == 1) to[lane_word(j, WORDS, lane)] = first | second << 1;
    else *reinterpret_cast<u64*>(to + lane_word(2 * j, WORDS, lane)) = first | (u64)second << 32;
  }
  report(scale, (bad ? VALUE_STATES : 0) | (is_beyond ? VALUE_RANGE : 0), scale_max + bh, faults);
}
