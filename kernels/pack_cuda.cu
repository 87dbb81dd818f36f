// From the portable layout of packed.py to records in fragment order; see fragments.py for both orders. A block makes one record.
// Compile-time constants as for attend_cuda.cu, and SEGMENTS, how many segments the key channels come in.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

constexpr int NARROW_STEPS = KEY_STEPS - WIDE_STEPS;
constexpr int TILES = WIDTH / 16;
constexpr int KEY_CODES = WIDE_STEPS * 128 + NARROW_STEPS * 64;
constexpr int KEY_PAIRS = (KEY_STEPS + 1) / 2;
constexpr int KEY_RECORD = CHUNKS * KEY_CODES + KEY_PAIRS * 64 + (STORED_STEPS / 2) * 64 + (STORED_STEPS % 2) * 32;
constexpr int VALUE_CODES = TILES * 64 * VALUE_BITS;
constexpr int VALUE_METADATA = VALUE_SCALE == 1 ? WIDTH * 2 : VALUE_SCALE == 2 ? WIDTH * 2 * CHUNKS : 0;
constexpr int VALUE_RECORD = CHUNKS * VALUE_CODES + VALUE_METADATA * (VALUE_STORED ? 2 : 1);

struct Segments {  // of key channels: where each begins, among channels and among the words of 32 tokens
  int first_channel[SEGMENTS + 1];
  int first_word[SEGMENTS];
  int bits[SEGMENTS];
};

// Code of one token of a channel, given the words of 32 tokens of a segment.
__device__ __forceinline__ u32 code_of(const u32* words, int bits, int channels, int channel, int token) {
  return bits == 2 ? words[(token >> 4) * channels + channel] >> (2 * (token & 15)) & 3u : words[channel] >> token & 1u;
}

// Where the words of lane `lane` of fragment `step` of `steps` begin, in words: fragments in fours, then two, then one.
__device__ __forceinline__ int lane_word(int step, int steps, int lane) {
  const int whole = steps / 4 * 4;
  if (step < whole) return (step / 4 * 32 + lane) * 4 + step % 4;
  const int left = steps - whole, at = step - whole;
  if (left >= 2 && at < 2) return whole * 32 + lane * 2 + at;
  return (steps - 1) * 32 + lane;
}

__device__ __forceinline__ void raise_to(float* largest, float value) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, k));
  if ((threadIdx.x & 31) == 0) atomicMax(reinterpret_cast<int*>(largest), __float_as_int(value));
}

__device__ __forceinline__ float size_of(u16 half) {
  float y;
  asm("{ .reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "h"(half));
  return fabsf(y);
}

// Records of sequence b go behind its first `starts[b]` tokens; it has `counts[b]` new ones. Blocks: records, heads, sequences.
extern "C" __global__ void pack_keys(const u32* codes, const u16* scale, const u16* offset, i64 groups, Segments segments, int stored,
                                     const int* starts, const int* counts, u8* records, i64 capacity, float* scale_max) {
  const int record = blockIdx.x, batch = blockIdx.z, thread = threadIdx.x;
  if (record * 32 * CHUNKS >= counts[batch]) return;
  const i64 bh = (i64)batch * gridDim.y + blockIdx.y, group = bh * groups + record;
  u8* const out = records + (bh * capacity + starts[batch] / (32 * CHUNKS) + record) * KEY_RECORD;
  const int last_channels = segments.first_channel[SEGMENTS] - segments.first_channel[SEGMENTS - 1];
  const int row_words = segments.first_word[SEGMENTS - 1] + segments.bits[SEGMENTS - 1] * last_channels;
  constexpr int PAIRS = NARROW_STEPS / 2, WORDS = WIDE_STEPS + PAIRS + NARROW_STEPS % 2;
  for (int i = thread; i < CHUNKS * WORDS * 32; i += blockDim.x) {
    const int lane = i % 32, word = i / 32 % WORDS, chunk = i / (32 * WORDS), g = lane >> 2, t = lane & 3;
    const u32* words = codes + ((group * CHUNKS + chunk) * row_words);
    u8* const at = out + chunk * KEY_CODES;
    const bool is_wide = word < WIDE_STEPS, is_last = NARROW_STEPS % 2 && word == WORDS - 1;
    u32 packed = 0;
    for (int parity = 0; parity < (is_wide || is_last ? 1 : 2); parity++) {
      const int step = is_wide ? word : WIDE_STEPS + 2 * (word - WIDE_STEPS) + parity;
      for (int column = 0; column < 4; column++) {
        const int kh = column >> 1, e = column & 1, channel = 16 * step + 8 * kh + 2 * t + e;
        if (channel >= CHANNELS) continue;
        int s = 0;
        while (channel >= segments.first_channel[s + 1]) s++;
        const u32* mine = words + segments.first_word[s];
        const int channels = segments.first_channel[s + 1] - segments.first_channel[s], own = channel - segments.first_channel[s];
        for (int row = 0; row < 4; row++) {
          const int m = row >> 1, rr = row & 1;
          const u32 code = code_of(mine, segments.bits[s], channels, own, 16 * m + 8 * rr + g);
          packed |= code << (is_last ? 8 * e + m + 4 * rr + 2 * kh : 16 * e + 8 * m + 4 * rr + 2 * kh + parity);
        }
      }
    }
    if (is_wide) reinterpret_cast<u32*>(at)[lane_word(word, WIDE_STEPS, lane)] = packed;
    else if (is_last) reinterpret_cast<u16*>(at + WIDE_STEPS * 128 + PAIRS * 128)[lane] = (u16)packed;
    else reinterpret_cast<u32*>(at + WIDE_STEPS * 128)[lane_word(word - WIDE_STEPS, PAIRS, lane)] = packed;
  }
  u16* const halves = reinterpret_cast<u16*>(out + CHUNKS * KEY_CODES);
  float largest = 0.f;
  for (int i = thread; i < KEY_PAIRS * 32 + STORED_STEPS * 16; i += blockDim.x) {
    const bool is_scale = i < KEY_PAIRS * 32;
    const int k = is_scale ? i : i - KEY_PAIRS * 32, steps = is_scale ? KEY_PAIRS * 2 : STORED_STEPS, e = k & 1, kh = k >> 1 & 1;
    const bool is_single = k / 32 >= steps / 2;
    const int step = is_single ? steps - 1 : k / 32 * 2 + (k >> 2 & 1), t = is_single ? k >> 2 & 3 : k >> 3 & 3;
    const int channel = 16 * step + 8 * kh + 2 * t + e, count = is_scale ? CHANNELS : stored;
    const u16 half = channel < count ? (is_scale ? scale : offset)[group * count + channel] : (u16)0;
    halves[i] = half;
    if (is_scale) largest = fmaxf(largest, size_of(half));
  }
  raise_to(scale_max + bh, largest);
}

// `entries` is the room of the source, in tokens.
extern "C" __global__ void pack_values(const u32* codes, const u16* scale, const u16* offset, i64 entries, const int* starts,
                                       const int* counts, u8* records, i64 capacity, float* scale_max) {
  const int record = blockIdx.x, batch = blockIdx.z, thread = threadIdx.x;
  if (record * 32 * CHUNKS >= counts[batch]) return;
  const i64 bh = (i64)batch * gridDim.y + blockIdx.y;
  u8* const out = records + (bh * capacity + starts[batch] / (32 * CHUNKS) + record) * VALUE_RECORD;
  constexpr int WORDS = TILES * VALUE_BITS / 2;
  for (int i = thread; i < CHUNKS * WORDS * 32; i += blockDim.x) {
    const int lane = i % 32, word = i / 32 % WORDS, chunk = i / (32 * WORDS), g = lane >> 2, t = lane & 3;
    const u32* words = codes + (bh * (entries / 32) + record * CHUNKS + chunk) * (VALUE_BITS * WIDTH);
    u32 packed = 0;
    for (int parity = 0; parity < (VALUE_BITS == 1 ? 2 : 1); parity++) {
      const int tile = VALUE_BITS == 1 ? 2 * word + parity : word;
      for (int rr = 0; rr < 2; rr++) {
        const int channel = 32 * (tile >> 1) + 8 * (g >> 1) + 4 * (tile & 1) + 2 * rr + (g & 1);
        for (int k = 0; k < 8; k++) {
          const int m = k >> 2, kh = k >> 1 & 1, e = k & 1;
          packed |= code_of(words, VALUE_BITS, WIDTH, channel, 16 * m + 8 * kh + 2 * t + e) << (16 * e + 8 * m + 4 * rr + 2 * kh + parity);
        }
      }
    }
    reinterpret_cast<u32*>(out + chunk * VALUE_CODES)[lane_word(word, WORDS, lane)] = packed;
  }
  float largest = 0.f;
  u16* const halves = reinterpret_cast<u16*>(out + CHUNKS * VALUE_CODES);
  for (int i = thread; i < VALUE_METADATA / 2 * (VALUE_STORED ? 2 : 1); i += blockDim.x) {
    const bool is_scale = i < VALUE_METADATA / 2;
    const int k = is_scale ? i : i - VALUE_METADATA / 2;
    i64 at;
    bool is_held = true;
    if (VALUE_SCALE == 2) {
      const int e = k & 1, kh = k >> 1 & 1, m = k >> 2 & 1, t = k >> 3 & 3, group = k / 32 % (WIDTH / 32), chunk = k / WIDTH;
      const int token = (record * CHUNKS + chunk) * 32 + 16 * m + 8 * kh + 2 * t + e;
      is_held = token < counts[batch];
      at = (bh * entries + token) * (WIDTH / 32) + group;
    } else {
      const int rr = k & 1, tile = k / 2 % TILES, g = k / (2 * TILES);
      at = (bh * (entries / (32 * CHUNKS)) + record) * WIDTH + 32 * (tile >> 1) + 8 * (g >> 1) + 4 * (tile & 1) + 2 * rr + (g & 1);
    }
    const u16 half = is_held ? (is_scale ? scale : offset)[at] : (u16)0;
    halves[i] = half;
    if (is_scale) largest = fmaxf(largest, size_of(half));
  }
  if (VALUE_SCALE) raise_to(scale_max + bh, largest);
}
