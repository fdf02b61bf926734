// Causal attention within the samples of packed rows, forward and backward, for CPUs.
//
// Which key a query sees
//   Query i of a row sees the keys lo(i) .. hi(i) - 1. Neither bound decreases along a row, so the
//   scores that exist form a band. Everything here is organised so that work outside it is not
//   done. Where queries and keys are the same tokens, hi(i) = i + 1 and lo(i) is the first token of
//   i's sample or of its window, whichever is later. In a ring they are tokens of two ranks, and
//   both bounds are given; many queries then see nothing.
//
// How the work is cut
//   row -> spans -> blocks -> tiles.
//   * A span is a run of whole samples: nothing crosses its ends, so it is a problem of its own.
//     Each long sample is one span; short samples share one until they fill a block; queries that
//     see nothing are in none. Tasks (span x head, and in the forward pass runs of queries of a
//     span) are what threads take from a queue.
//   * A block is kQueries x kKeys scores. Its operands sit in L2, what is being reused in L1.
//   * A tile is kTileRows x kPanel scores: it is held in registers while it is being summed, and is
//     the unit that is skipped when the band misses it.
//   * Padding, a run of samples of one token, is a span too, and is copied rather than computed.
//   Who computes a task does not change what is computed or in which order it is added up: the
//   result has the same bits for every number of threads, and nothing is added atomically.
//
// How matrices are stored while they are worked on
//   As panels: kPanel columns wide, rows one after another (see Panels). In this form one copy of a
//   matrix can be the left factor of a product (its elements are broadcast), the transposed left
//   factor, the right factor (its rows are loaded as vectors) or the result. So P and dS are
//   written once by the product that makes them and read in both orientations by those that
//   follow, and only K and V need a second, transposed copy.
//
// The mathematics (Dao 2023, FlashAttention-2, algorithms 1 and 2), in base 2 inside
//   forward   S = scale Q K^T,  P = exp(S - rowmax),  O = P V / rowsum(P), keys block by block with
//             the running maximum and sum of each row; the logsumexp of each row is kept. (O, that
//             logsumexp, 1) is itself such a running state: from there a ring goes on with the
//             next rank's keys, and in its backward pass O and the logsumexp are those of all keys.
//   backward  P = exp(S - logsumexp),  dV = P^T dO,  dP = dO V^T,  D = rowsum(dO * O),
//             dS = P * (dP - D),  dQ = scale dS K,  dK = scale dS^T Q.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

#define INLINE inline __attribute__((always_inline))

// ---------------------------------------------------------------------------------------------
// Vectors. The shape of a tile follows from the registers: kTileRows * kVectors accumulators,
// kVectors of the right factor and one broadcast element must fit, and there must be enough
// independent accumulators (latency x units, 8 to 10 today) to keep the multiply-add units busy.

#ifndef OMNISTEP_VECTOR_BYTES
#if defined(__AVX512F__)
#define OMNISTEP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define OMNISTEP_VECTOR_BYTES 32
#else
#define OMNISTEP_VECTOR_BYTES 16
#endif
#endif

#if OMNISTEP_VECTOR_BYTES == 64  // AVX-512: 32 registers of 64 bytes, 24 accumulators
constexpr int kTileRows = 12, kVectors = 2;
#elif OMNISTEP_VECTOR_BYTES == 32  // AVX2: 16 registers of 32 bytes, 12 accumulators
constexpr int kTileRows = 6, kVectors = 2;
#elif defined(__aarch64__)  // NEON: 32 registers of 16 bytes, 24 accumulators
constexpr int kTileRows = 6, kVectors = 4;
#else  // SSE and others: 16 registers of 16 bytes, 12 accumulators
constexpr int kTileRows = 6, kVectors = 2;
#endif

template <typename T> struct Simd {
  static constexpr int kLanes = OMNISTEP_VECTOR_BYTES / sizeof(T);
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(OMNISTEP_VECTOR_BYTES)));
  typedef Bits Mask __attribute__((vector_size(OMNISTEP_VECTOR_BYTES)));
};

template <typename T> using Vector = typename Simd<T>::Vector;
template <typename T> using Mask = typename Simd<T>::Mask;
template <typename T> constexpr int kLanes = Simd<T>::kLanes;
template <typename T> constexpr int kPanel = kVectors * kLanes<T>;

// Sizes that were fastest for head_dim 64 and 128 with 32 KiB of L1 and 512 KiB of L2.
constexpr int kQueries = 192;     // rows of a block: a multiple of every kTileRows above
constexpr int kKeys = 64;         // columns of a block: a multiple of every kPanel above
constexpr int kRunQueries = 576;  // queries of one forward task, which share each packing of K, V

constexpr int kPadding = 16;      // from how many on samples of one token are a span of padding

static_assert(kQueries % kTileRows == 0 && kRunQueries % kQueries == 0);
static_assert(kKeys % kPanel<float> == 0 && kKeys % kPanel<double> == 0);

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T> INLINE Vector<T> load(const T* from) {
  Vector<T> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T> INLINE void store(T* to, Vector<T> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <typename T> INLINE Vector<T> splat(T value) { return value - Vector<T>{}; }

// Lane i of the result is lane i ^ Distance: what a reduction in log2(lanes) steps needs.
template <typename T, int Distance, int... I>
INLINE Vector<T> exchange(Vector<T> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ Distance)...);
}

template <typename T, int Distance = kLanes<T> / 2> INLINE T sum_of(Vector<T> x) {
  if constexpr (Distance == 0) {
    return x[0];
  } else {
    const auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
    return sum_of<T, Distance / 2>(x + exchange<T, Distance>(x, lanes));
  }
}

template <typename T, int Distance = kLanes<T> / 2> INLINE T max_of(Vector<T> x) {
  if constexpr (Distance == 0) {
    return x[0];
  } else {
    const auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
    const Vector<T> other = exchange<T, Distance>(x, lanes);
    return max_of<T, Distance / 2>(x > other ? x : other);
  }
}

template <typename T, int... I> INLINE Vector<T> iota(std::integer_sequence<int, I...>) {
  return Vector<T>{T(I)...};
}

template <typename T> INLINE T dot(const T* a, const T* b, int count) {
  Vector<T> sum{};
  int i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) sum += load(a + i) * load(b + i);
  T total = sum_of<T>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// Lanes 0, 1, 2, ... shifted by `first`.
template <typename T> INLINE Mask<T> lane_index(int first) {
  const auto lanes = iota<T>(std::make_integer_sequence<int, kLanes<T>>{});
  return __builtin_convertvector(lanes, Mask<T>) + typename Simd<T>::Bits(first);
}

// 2^x for x <= 128 (float), 1024 (double); below the smallest normal number the result stays at
// about that number. x = n + f with |f| <= 1/2: a polynomial for 2^f (interpolating at Chebyshev
// nodes; relative error 2.5e-9 and 4.2e-18), then n is added to the exponent's bits. n is read
// from the low bits of x + 1.5 * 2^mantissa, an addition that rounds to an integer. NaN stays NaN.
template <typename T> INLINE Vector<T> exp2_of(Vector<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = std::numeric_limits<T>::digits - 1;
  const Vector<T> least = splat<T>(single ? -125 : -1021);
  x = least > x ? least : x;
  const Vector<T> shifter = splat<T>(T(1.5) * T(int64_t(1) << mantissa));
  const Vector<T> shifted = x + shifter;
  const Vector<T> f = x - (shifted - shifter);
  Vector<T> y;
  if constexpr (single) {
    y = splat<T>(0.00015461444698569129);
    y = y * f + T(0.001340042817761583794);
    y = y * f + T(0.0096180566785246380754);
    y = y * f + T(0.055503272266703020589);
    y = y * f + T(0.24022650922288758071);
    y = y * f + T(0.69314720670283259577);
    y = y * f + T(1);
  } else {
    y = splat<T>(4.455817908336064493e-10);
    y = y * f + T(7.0741942972885210056e-9);
    y = y * f + T(1.0178057087733941105e-7);
    y = y * f + T(1.3215432535912376166e-6);
    y = y * f + T(0.000015252733841556772589);
    y = y * f + T(0.00015403530463724354209);
    y = y * f + T(0.0013333558146406470697);
    y = y * f + T(0.0096181291075872566681);
    y = y * f + T(0.055504108664821627039);
    y = y * f + T(0.24022650695910159567);
    y = y * f + T(0.69314718055994530925);
    y = y * f + T(0.99999999999999999693);
  }
  return (Vector<T>)((Mask<T>)y + ((Mask<T>)shifted << mantissa));
}

// ---------------------------------------------------------------------------------------------
// Panels: element (row, column) lies at [column / kPanel][row][column % kPanel].

template <typename T> struct Panels {
  T* data;
  int rows;

  INLINE T* at(int panel, int row) const {
    return data + (int64_t(panel) * rows + row) * kPanel<T>;
  }
};

// A tensor [rows, seq, heads, head_dim] in memory; the last axis is contiguous.
template <typename T> struct Strided {
  T* data;
  int64_t row, token, head;

  T* at(int64_t r, int64_t t, int64_t h) const { return data + r * row + t * token + h * head; }
};

// The rows of one head lie far apart, too far for hardware to foresee: asked for in advance.
template <typename T> INLINE void prefetch_row(const T* row, int columns) {
  for (int c = 0; c < columns; c += 64 / int(sizeof(T))) __builtin_prefetch(row + c);
}

// `count` rows of `columns` elements, `stride` apart, into `to` from row `first` on; the last
// panel and the rows up to `padded` are filled with zeros.
template <typename T>
void pack(Panels<T> to, int first, const T* from, int64_t stride, int count, int padded,
          int columns) {
  const int panels = ceil_div(columns, kPanel<T>), full = columns / kPanel<T>;
  for (int r = 0; r < count; ++r, from += stride) {
    if (r + 8 < count) prefetch_row(from + 8 * stride, columns);
    for (int p = 0; p < full; ++p)
      for (int v = 0; v < kPanel<T>; v += kLanes<T>)
        store(to.at(p, first + r) + v, load(from + p * kPanel<T> + v));
    if (full < panels) {
      const int width = columns - full * kPanel<T>;
      T* target = to.at(full, first + r);
      for (int c = 0; c < kPanel<T>; ++c) target[c] = c < width ? from[full * kPanel<T> + c] : T(0);
    }
  }
  for (int p = 0; p < panels; ++p)
    std::fill(to.at(p, first + count), to.at(p, first + padded), T(0));
}

// Row `row` of `from`, times `factor`, written (or added) to `dim` elements at `to`.
template <bool Add, typename T>
INLINE void unpack_row(Panels<T> from, int row, T* to, int dim, T factor) {
  for (int p = 0; p * kPanel<T> < dim; ++p) {
    const T* source = from.at(p, row);
    T* target = to + p * kPanel<T>;
    if ((p + 1) * kPanel<T> <= dim) {
      for (int v = 0; v < kPanel<T>; v += kLanes<T>)
        store(target + v, load(source + v) * factor + (Add ? load(target + v) : Vector<T>{}));
    } else {
      for (int c = 0; c < dim - p * kPanel<T>; ++c)
        target[c] = source[c] * factor + (Add ? target[c] : T(0));
    }
  }
}

// The same for rows 0 .. count-1, to rows `stride` apart.
template <typename T>
void unpack(Panels<T> from, T* to, int64_t stride, int count, int dim, T factor, bool add) {
  for (int r = 0; r < count; ++r)
    add ? unpack_row<true>(from, r, to + r * stride, dim, factor)
        : unpack_row<false>(from, r, to + r * stride, dim, factor);
}

// One round of a transposition: (a0 b0 a1 b1 ...) of the lower and of the upper halves.
template <typename T, int... I>
INLINE void interleave(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>;
  const Vector<T> low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * n)...);
  const Vector<T> high = __builtin_shufflevector(a, b, (n / 2 + I / 2 + (I % 2) * n)...);
  a = low, b = high;
}

// The transpose of `count` <= kKeys rows: row d of `to` holds element d of every source row, and
// the rows of `to` beyond `columns` are zeros.
template <typename T>
void pack_transposed(Panels<T> to, const T* from, int64_t stride, int count, int columns) {
  constexpr int n = kLanes<T>;
  for (int key = 0; key < ceil_div(count, kPanel<T>) * kPanel<T>; key += n) {
    T* target = to.at(key / kPanel<T>, 0) + key % kPanel<T>;
    for (int i = key + n; i < std::min(key + 2 * n, count); ++i)
      prefetch_row(from + i * stride, columns);
    int d = 0;
    if (key + n <= count) {
      for (; d + n <= columns; d += n) {
        Vector<T> square[n], next[n];
        for (int i = 0; i < n; ++i) square[i] = load(from + (key + i) * stride + d);
#pragma GCC unroll 4
        for (int width = n / 2; width; width /= 2) {
#pragma GCC unroll 16
          for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = square[i], next[2 * i + 1] = square[i + n / 2];
            interleave<T>(next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, n>{});
          }
          for (int i = 0; i < n; ++i) square[i] = next[i];
        }
        for (int i = 0; i < n; ++i) store(target + (d + i) * kPanel<T>, square[i]);
      }
    }
    for (; d < columns; ++d)
      for (int i = 0; i < n; ++i)
        target[d * kPanel<T> + i] = key + i < count ? from[(key + i) * stride + d] : T(0);
    for (; d < to.rows; ++d) store(target + d * kPanel<T>, Vector<T>{});
  }
}

// ---------------------------------------------------------------------------------------------
// Products of panels. `sum` is one tile of the result.

template <typename T, int Rows> struct Tile {
  Vector<T> sum[Rows][kVectors] = {};
};

// sum[r] += a[r * RowStep + k * DepthStep] * b[k] for k < depth: depth outer products. With steps
// (kPanel, 1) `a` is read along its rows, with (1, kPanel) down its columns, i.e. transposed.
template <int RowStep, int DepthStep, typename T, int Rows>
INLINE void outer_products(Tile<T, Rows>& tile, const T* a, const T* b, int depth) {
#pragma GCC unroll 4
  for (int k = 0; k < depth; ++k) {
    Vector<T> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kPanel<T> + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vector<T> left = splat(a[r * RowStep + k * DepthStep]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile.sum[r][v] += left * right[v];
    }
  }
}

// Rows row.. of A times one panel of B, summed over A's panels first .. last-1.
template <typename T>
INLINE Tile<T, kTileRows> product(Panels<T> a, int row, Panels<T> b, int panel, int first,
                                  int last) {
  Tile<T, kTileRows> tile;
  for (int p = first; p < last; ++p)
    outer_products<kPanel<T>, 1>(tile, a.at(p, row), b.at(panel, p * kPanel<T>), kPanel<T>);
  return tile;
}

// C[panel of A's columns, panel] += A^T B, summed over the rows first .. last-1 of A and B. A
// panel's columns are cut into tiles as even as can be: 16 = 6 + 5 + 5.
template <int Column = 0, typename T>
INLINE void add_transposed_product(Panels<T> c, Panels<T> a, int a_panel, Panels<T> b, int panel,
                                   int first, int last) {
  if constexpr (Column < kPanel<T>) {
    constexpr int tiles_left = (kPanel<T> - Column + kTileRows - 1) / kTileRows;
    constexpr int rows = (kPanel<T> - Column + tiles_left - 1) / tiles_left;
    Tile<T, rows> tile;
    outer_products<1, kPanel<T>>(tile, a.at(a_panel, first) + Column, b.at(panel, first),
                                 last - first);
    T* target = c.at(panel, a_panel * kPanel<T> + Column);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r, target += kPanel<T>)
      for (int v = 0; v < kVectors; ++v)
        store(target + v * kLanes<T>, load(target + v * kLanes<T>) + tile.sum[r][v]);
    add_transposed_product<Column + rows>(c, a, a_panel, b, panel, first, last);
  }
}

// ---------------------------------------------------------------------------------------------
// The band: which tiles of a block exist, in coordinates of the span.

struct Span {
  int row, first, length;  // its queries
  int key, keys;           // its keys: the first, and how many
  bool padding;            // nothing but samples of one token; keys and queries are the same tokens
  const int *lo, *hi;      // of its queries, counted from the span's first key
};

struct Range {
  int first = 0, last = 0;  // half open
  bool empty() const { return first >= last; }
};

template <typename T> struct Block {
  int query, queries;  // first query, and how many
  int key, keys;
  const int *lo, *hi;  // of the block's queries
  Range panels[kQueries / kTileRows];  // of each tile row: the panels of keys that exist
  Range tiles[kKeys / kPanel<T>];      // of each panel: the rows (whole tiles) that exist
  int tile_count = 0;

  Block(const Span& span, int query, int queries, int key, int keys)
      : query(query), queries(queries), key(key), keys(keys), lo(span.lo + query),
        hi(span.hi + query) {
    for (int row = 0, t = 0; row < queries; row += kTileRows, ++t) {
      const int bottom = std::min(row + kTileRows, queries) - 1;
      const int from = std::max(lo[row] - key, 0);
      const int to = std::min(hi[bottom] - key, keys) - 1;
      if (from > to) continue;
      panels[t] = {from / kPanel<T>, to / kPanel<T> + 1};
      tile_count += panels[t].last - panels[t].first;
      for (int p = panels[t].first; p < panels[t].last; ++p) {
        if (tiles[p].empty()) tiles[p].first = row;
        tiles[p].last = row + kTileRows;
        const int left = key + p * kPanel<T>, right = left + kPanel<T> - 1;
        if (lo[bottom] <= left && right < hi[row]) whole_[t] |= 1u << p;
      }
    }
  }

  // Whether a tile lies wholly inside the band, so that no element of it needs a mask.
  INLINE bool whole(int t, int panel) const { return whole_[t] >> panel & 1; }

  // Lanes of vector v of a panel that row `row` sees. A row of padding sees what the last one does.
  INLINE Mask<T> seen(int row, int panel, int v) const {
    row = std::min(row, queries - 1);
    const Mask<T> lane = lane_index<T>(key + panel * kPanel<T> + v * kLanes<T>);
    using Bits = typename Simd<T>::Bits;
    return (lane >= Bits(lo[row])) & (lane < Bits(hi[row]));
  }

 private:
  uint32_t whole_[kQueries / kTileRows] = {};  // a bit for each panel
};

// Whether any query of a block sees any of its keys: lo and hi do not decrease: the corners tell.
inline bool touches(const Span& span, int query, int queries, int key, int keys) {
  return key < span.hi[query + queries - 1] && span.lo[query] < key + keys;
}

// A thread's memory: arrays that begin on cache lines and live as long as this.
class Scratch {
 public:
  template <typename T> T* take(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    arrays_.push_back(std::aligned_alloc(64, std::max<int64_t>(bytes, 64)));
    return static_cast<T*>(arrays_.back());
  }
  template <typename T> Panels<T> panels(int rows, int columns) {
    return {take<T>(int64_t(rows) * ceil_div(columns, kPanel<T>) * kPanel<T>), rows};
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (void* array : arrays_) std::free(array);
  }

 private:
  std::vector<void*> arrays_;
};

template <typename T> struct Problem {
  int rows, seq, heads, kv_heads, head_dim, key_seq;  // key_seq: keys of a row
  Strided<const T> q, k, v;
  T scale;

  // Of a token's head in contiguous tensors of the shapes of q and of k, and in [rows, heads, seq].
  int64_t offset(int row, int token, int head) const {
    return ((int64_t(row) * seq + token) * heads + head) * head_dim;
  }
  int64_t kv_offset(int row, int token, int kv_head) const {
    return ((int64_t(row) * key_seq + token) * kv_heads + kv_head) * head_dim;
  }
  int64_t lse_offset(int row, int head, int token) const {
    return (int64_t(row) * heads + head) * seq + token;
  }
  int panels() const { return ceil_div(head_dim, kPanel<T>); }
  int kv_head(int head) const { return head / (heads / kv_heads); }
  T scale_log2() const { return scale * T(1.4426950408889634074); }
};

constexpr double kLn2 = 0.69314718055994530942;

// ---------------------------------------------------------------------------------------------
// Padding: a token that sees only itself returns its value, and its scores have no gradient.

template <typename T>
void forward_padding(const Problem<T>& problem, const Span& span, int head, T* out, T* lse) {
  const int dim = problem.head_dim, kv_head = problem.kv_head(head);
  for (int i = span.first; i < span.first + span.length; ++i) {
    const T* v = problem.v.at(span.row, i, kv_head);
    const T* k = problem.k.at(span.row, i, kv_head);
    std::copy(v, v + dim, out + problem.offset(span.row, i, head));
    lse[problem.lse_offset(span.row, head, i)] =
        problem.scale * dot(problem.q.at(span.row, i, head), k, dim);
  }
}

template <typename T>
void backward_padding(const Problem<T>& problem, const Span& span, int kv_head,
                      Strided<const T> out_grad, T* q_grad, T* k_grad, T* v_grad) {
  const int dim = problem.head_dim, group = problem.heads / problem.kv_heads;
  for (int i = span.first; i < span.first + span.length; ++i) {
    const int64_t to = problem.kv_offset(span.row, i, kv_head);
    std::fill(k_grad + to, k_grad + to + dim, T(0));
    std::fill(v_grad + to, v_grad + to + dim, T(0));
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      T* q_to = q_grad + problem.offset(span.row, i, head);
      std::fill(q_to, q_to + dim, T(0));
      const T* grad = out_grad.at(span.row, i, head);
      for (int d = 0; d < dim; ++d) v_grad[to + d] += grad[d];
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Forward: one head, a run of up to kRunQueries queries of a span. Keys are the outer loop, so a
// block of K and V is packed once and used by every query block of the run.

template <typename T> struct Forward {
  Panels<T> q, o, k_t, v, s;
  T *maximum, *total;  // of the run's queries
  T *decay, *added;    // of the block's: by how much the past shrinks, and what is new in the sum

  Forward(Scratch& scratch, const Problem<T>& problem)
      : q(scratch.panels<T>(kRunQueries, problem.head_dim)),
        o(scratch.panels<T>(kRunQueries, problem.head_dim)),
        k_t(scratch.panels<T>(problem.panels() * kPanel<T>, kKeys)),
        v(scratch.panels<T>(kKeys, problem.head_dim)),
        s(scratch.panels<T>(kQueries, kKeys)),
        maximum(scratch.take<T>(kRunQueries)),
        total(scratch.take<T>(kRunQueries)),
        decay(scratch.take<T>(kQueries)),
        added(scratch.take<T>(kQueries)) {}

  // S = scale log2(e) Q K^T on the tiles that exist.
  void scores(const Problem<T>& problem, const Block<T>& block, int at) {
    const T scale = problem.scale_log2();
    for (int p = 0; p < kKeys / kPanel<T>; ++p) {
      for (int row = block.tiles[p].first; row < block.tiles[p].last; row += kTileRows) {
        const auto tile = product(q, at + row, k_t, p, 0, problem.panels());
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r)
          for (int i = 0; i < kVectors; ++i)
            store(s.at(p, row + r) + i * kLanes<T>, tile.sum[r][i] * scale);
      }
    }
  }

  // One row of S becomes P = 2^(S - maximum).
  INLINE void softmax_row(const Block<T>& block, int t, int row, int at) {
    const Range panels = block.panels[t];
    const Vector<T> nothing = splat(-std::numeric_limits<T>::infinity());
    Vector<T> most = nothing;
    for (int p = panels.first; p < panels.last; ++p)
      for (int i = 0; i < kVectors; ++i) {
        Vector<T> x = load(s.at(p, row) + i * kLanes<T>);
        if (!block.whole(t, p)) x = block.seen(row, p, i) ? x : nothing;
        most = x > most ? x : most;
      }
    const T before = maximum[at + row];
    const T now = std::max(before, max_of<T>(most));
    // A row that has seen no key yet has maximum -inf; subtracting 0 keeps it free of NaN.
    const T shift = now == -std::numeric_limits<T>::infinity() ? T(0) : now;
    Vector<T> sum{};
    for (int p = panels.first; p < panels.last; ++p)
      for (int i = 0; i < kVectors; ++i) {
        T* here = s.at(p, row) + i * kLanes<T>;
        Vector<T> e = exp2_of<T>(load(here) - shift);
        if (!block.whole(t, p)) e = block.seen(row, p, i) ? e : Vector<T>{};
        store(here, e);
        sum += e;
      }
    maximum[at + row] = now;
    decay[row] = before - shift;
    added[row] = sum_of<T>(sum);
  }

  // S becomes P on the tiles that exist; running maximum and sum are brought up to date. What
  // every row needs an exponential for, once, is left to the end and done a vector of rows at once.
  void softmax(const Block<T>& block, int at) {
    for (int row = 0; row < ceil_div(block.queries, kTileRows) * kTileRows; ++row)
      softmax_row(block, row / kTileRows, row, at);
    for (int row = 0; row < block.queries; row += kLanes<T>) {
      const Vector<T> shrink = exp2_of<T>(load(decay + row));
      store(decay + row, shrink);
      store(total + at + row, load(total + at + row) * shrink + load(added + row));
    }
  }

  // O = decay * O + P V.
  void outputs(const Problem<T>& problem, const Block<T>& block, int at) {
    for (int p = 0; p < problem.panels(); ++p) {
      for (int row = 0, t = 0; row < block.queries; row += kTileRows, ++t) {
        if (block.panels[t].empty()) continue;
        const auto tile = product(s, row, v, p, block.panels[t].first, block.panels[t].last);
        T* target = o.at(p, at + row);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r, target += kPanel<T>)
          for (int i = 0; i < kVectors; ++i)
            store(target + i * kLanes<T>,
                  load(target + i * kLanes<T>) * decay[row + r] + tile.sum[r][i]);
      }
    }
  }

  // The state before the first key: empty, or (resume) what `out` and `lse` say of earlier keys.
  void begin(const Problem<T>& problem, const Span& span, int head, int start, int count,
             int padded, const T* out, const T* lse, bool resume) {
    const T nothing = -std::numeric_limits<T>::infinity();
    std::fill(maximum, maximum + padded, nothing);
    std::fill(total, total + padded, T(0));
    if (!resume) {
      for (int p = 0; p < problem.panels(); ++p) std::fill(o.at(p, 0), o.at(p, padded), T(0));
      return;
    }
    const int token = span.first + start, dim = problem.head_dim;
    pack(o, 0, out + problem.offset(span.row, token, head), int64_t(problem.heads) * dim, count,
         padded, dim);
    for (int i = 0; i < count; ++i) {
      maximum[i] = T(1 / kLn2) * lse[problem.lse_offset(span.row, head, token + i)];
      total[i] = maximum[i] == nothing ? T(0) : T(1);
    }
  }

  // Queries start.. of the span: to `out` [rows, seq, heads, head_dim], `lse` [rows, heads, seq].
  // Returns the number of tiles of scores computed.
  int64_t run(const Problem<T>& problem, const Span& span, int head, int start, T* out, T* lse,
              bool resume) {
    const int count = std::min(kRunQueries, span.length - start);
    const int padded = ceil_div(count, kTileRows) * kTileRows;
    const int kv_head = problem.kv_head(head), dim = problem.head_dim;
    int64_t tiles = 0;
    pack(q, 0, problem.q.at(span.row, span.first + start, head), problem.q.token, count, padded,
         dim);
    begin(problem, span, head, start, count, padded, out, lse, resume);
    const int end = span.hi[start + count - 1];
    for (int key = span.lo[start]; key < end; key += kKeys) {
      const int keys = std::min(kKeys, end - key);
      bool packed = false;
      for (int at = 0; at < count; at += kQueries) {
        const int queries = std::min(kQueries, count - at);
        if (!touches(span, start + at, queries, key, keys)) continue;
        if (!packed) {
          const int64_t token = span.key + key;
          pack_transposed(k_t, problem.k.at(span.row, token, kv_head), problem.k.token, keys, dim);
          pack(v, 0, problem.v.at(span.row, token, kv_head), problem.v.token, keys,
               ceil_div(keys, kPanel<T>) * kPanel<T>, dim);
          packed = true;
        }
        const Block<T> block(span, start + at, queries, key, keys);
        scores(problem, block, at);
        softmax(block, at);
        outputs(problem, block, at);
        tiles += block.tile_count;
      }
    }
    for (int i = 0; i < count; ++i) {
      const int token = span.first + start + i;
      T* to = out + problem.offset(span.row, token, head);
      unpack_row<false>(o, i, to, dim, T(1) / total[i]);
      lse[problem.lse_offset(span.row, head, token)] =
          T(kLn2) * (maximum[i] + std::log2(total[i]));
    }
    return tiles;
  }
};

// ---------------------------------------------------------------------------------------------
// Backward: one key/value head, one whole span. The queries of one head (Q, dO) and their gradient
// stay packed while the key blocks go by; dK and dV of a key block are complete for a head when
// its last query block has passed, and are then added to those of the group's earlier heads.

template <typename T> struct Backward {
  Panels<T> q, d_o, d_q, k, k_t, v_t, d_k, d_v, p, d_s;
  T *lse, *delta;

  Backward(Scratch& scratch, const Problem<T>& problem, int longest)
      : q(scratch.panels<T>(longest, problem.head_dim)),
        d_o(scratch.panels<T>(longest, problem.head_dim)),
        d_q(scratch.panels<T>(longest, problem.head_dim)),
        k(scratch.panels<T>(kKeys, problem.head_dim)),
        k_t(scratch.panels<T>(problem.panels() * kPanel<T>, kKeys)),
        v_t(scratch.panels<T>(problem.panels() * kPanel<T>, kKeys)),
        d_k(scratch.panels<T>(kKeys, problem.head_dim)),
        d_v(scratch.panels<T>(kKeys, problem.head_dim)),
        p(scratch.panels<T>(kQueries, kKeys)),
        d_s(scratch.panels<T>(kQueries, kKeys)),
        lse(scratch.take<T>(longest)),
        delta(scratch.take<T>(longest)) {}

  // P = 2^(S - lse), finished while the tile of S is still in registers.
  void probabilities(const Problem<T>& problem, const Block<T>& block) {
    const T scale = problem.scale_log2();
    for (int panel = 0; panel < kKeys / kPanel<T>; ++panel) {
      for (int row = block.tiles[panel].first; row < block.tiles[panel].last; row += kTileRows) {
        const auto tile = product(q, block.query + row, k_t, panel, 0, problem.panels());
        const bool whole = block.whole(row / kTileRows, panel);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          for (int i = 0; i < kVectors; ++i) {
            Vector<T> e = exp2_of<T>(tile.sum[r][i] * scale - lse[block.query + row + r]);
            if (!whole) e = block.seen(row + r, panel, i) ? e : Vector<T>{};
            store(p.at(panel, row + r) + i * kLanes<T>, e);
          }
        }
      }
    }
  }

  // dS = P * (dO V^T - delta).
  void score_gradients(const Problem<T>& problem, const Block<T>& block) {
    for (int panel = 0; panel < kKeys / kPanel<T>; ++panel) {
      for (int row = block.tiles[panel].first; row < block.tiles[panel].last; row += kTileRows) {
        const auto tile = product(d_o, block.query + row, v_t, panel, 0, problem.panels());
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r)
          for (int i = 0; i < kVectors; ++i)
            store(d_s.at(panel, row + r) + i * kLanes<T>,
                  load(p.at(panel, row + r) + i * kLanes<T>) *
                      (tile.sum[r][i] - delta[block.query + row + r]));
      }
    }
  }

  // C += A^T B over the block's queries, A one of P and dS.
  void key_gradients(const Problem<T>& problem, const Block<T>& block, Panels<T> c, Panels<T> a,
                     Panels<T> b) {
    const Panels<T> queries{b.data + int64_t(block.query) * kPanel<T>, b.rows};
    for (int panel = 0; panel < problem.panels(); ++panel)
      for (int of_keys = 0; of_keys < kKeys / kPanel<T>; ++of_keys)
        if (!block.tiles[of_keys].empty())
          add_transposed_product(c, a, of_keys, queries, panel, block.tiles[of_keys].first,
                                 block.tiles[of_keys].last);
  }

  // dQ += dS K.
  void query_gradients(const Problem<T>& problem, const Block<T>& block) {
    for (int panel = 0; panel < problem.panels(); ++panel) {
      for (int row = 0, t = 0; row < block.queries; row += kTileRows, ++t) {
        if (block.panels[t].empty()) continue;
        const auto tile = product(d_s, row, k, panel, block.panels[t].first, block.panels[t].last);
        T* target = d_q.at(panel, block.query + row);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r, target += kPanel<T>)
          for (int i = 0; i < kVectors; ++i)
            store(target + i * kLanes<T>, load(target + i * kLanes<T>) + tile.sum[r][i]);
      }
    }
  }

  // The queries of one head, packed, with the row statistics the key blocks will need.
  void pack_queries(const Problem<T>& problem, const Span& span, int head, const T* out,
                    Strided<const T> out_grad, const T* logsumexp, int padded) {
    const int dim = problem.head_dim;
    pack(q, 0, problem.q.at(span.row, span.first, head), problem.q.token, span.length, padded, dim);
    pack(d_o, 0, out_grad.at(span.row, span.first, head), out_grad.token, span.length, padded, dim);
    for (int p = 0; p < problem.panels(); ++p)
      std::fill(d_q.at(p, 0), d_q.at(p, padded), T(0));
    for (int i = 0; i < padded; ++i) {
      lse[i] = delta[i] = 0;
      if (i >= span.length) continue;
      const int token = span.first + i;
      delta[i] = dot(out + problem.offset(span.row, token, head),
                     out_grad.at(span.row, token, head), dim);
      lse[i] = T(1 / kLn2) * logsumexp[problem.lse_offset(span.row, head, token)];
    }
  }

  // The span's share of the gradients, contiguous tensors of the shapes of q, k and v. Returns the
  // number of tiles of scores computed.
  int64_t run(const Problem<T>& problem, const Span& span, int kv_head, const T* out,
              Strided<const T> out_grad, const T* logsumexp, T* q_grad, T* k_grad, T* v_grad) {
    const int dim = problem.head_dim, group = problem.heads / problem.kv_heads;
    const int padded = ceil_div(span.length, kTileRows) * kTileRows;
    int64_t tiles = 0;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      pack_queries(problem, span, head, out, out_grad, logsumexp, padded);
      for (int key = 0; key < span.keys; key += kKeys) {
        const int keys = std::min(kKeys, span.keys - key);
        const T* k_from = problem.k.at(span.row, span.key + key, kv_head);
        const T* v_from = problem.v.at(span.row, span.key + key, kv_head);
        pack_transposed(k_t, k_from, problem.k.token, keys, dim);
        pack_transposed(v_t, v_from, problem.v.token, keys, dim);
        pack(k, 0, k_from, problem.k.token, keys, ceil_div(keys, kPanel<T>) * kPanel<T>, dim);
        const int64_t size = int64_t(kKeys) * problem.panels() * kPanel<T>;
        std::fill(d_k.data, d_k.data + size, T(0));
        std::fill(d_v.data, d_v.data + size, T(0));
        const int seer = int(std::upper_bound(span.hi, span.hi + span.length, key) - span.hi);
        for (int query = seer / kQueries * kQueries; query < span.length; query += kQueries) {
          const int queries = std::min(kQueries, span.length - query);
          if (!touches(span, query, queries, key, keys)) break;  // lo never decreases
          const Block<T> block(span, query, queries, key, keys);
          probabilities(problem, block);
          key_gradients(problem, block, d_v, p, d_o);
          score_gradients(problem, block);
          key_gradients(problem, block, d_k, d_s, q);
          query_gradients(problem, block);
          tiles += block.tile_count;
        }
        const int64_t to = problem.kv_offset(span.row, span.key + key, kv_head);
        const int64_t stride = int64_t(problem.kv_heads) * dim;
        const bool add = head > kv_head * group;
        unpack(d_k, k_grad + to, stride, keys, dim, problem.scale, add);
        unpack(d_v, v_grad + to, stride, keys, dim, T(1), add);
      }
      unpack(d_q, q_grad + problem.offset(span.row, span.first, head),
             int64_t(problem.heads) * dim, span.length, dim, problem.scale, false);
    }
    return tiles;
  }
};

// ---------------------------------------------------------------------------------------------
// Entry: from `starts` to spans, from spans to tasks, tasks to threads.

struct Band {
  std::vector<int> lo, hi;  // [rows * seq]: in tokens of the row, until spans count from their own
  std::vector<Span> spans;
  int longest = 0;  // span that is not padding
};

// The first token (row * seq + index) whose start is neither itself nor its predecessor's; or -1.
int64_t impossible_start(const int32_t* starts, int rows, int seq) {
  for (int64_t t = 0; t < int64_t(rows) * seq; ++t) {
    const int i = int(t % seq);
    if (starts[t] != i && (i == 0 || starts[t] != starts[t - 1])) return t;
  }
  return -1;
}

// The first query (row * seq + index) with a bound that decreases or is not in 0 .. keys; or -1.
int64_t impossible_bound(const int32_t* bounds, int rows, int seq, int keys) {
  for (int64_t t = 0; t < int64_t(rows) * seq; ++t)
    if (bounds[t] < (t % seq ? bounds[t - 1] : 0) || bounds[t] > keys) return t;
  return -1;
}

// Cuts the rows of a band into spans. Padding is told apart where all keys of a query are here.
void cut(Band& band, int rows, int seq, bool all_keys) {
  const std::vector<int> first_key = band.lo, end_key = band.hi;
  for (int row = 0; row < rows; ++row) {
    const int *lo = &first_key[int64_t(row) * seq], *hi = &end_key[int64_t(row) * seq];
    const auto add = [&](int first, int end, bool padding) {
      if (first == end) return;
      int *span_lo = &band.lo[int64_t(row) * seq + first];
      int *span_hi = &band.hi[int64_t(row) * seq + first];
      const int key = lo[first], length = end - first;
      band.spans.push_back(
          {row, first, length, key, hi[end - 1] - key, padding, span_lo, span_hi});
      if (!padding) band.longest = std::max(band.longest, length);
      for (int i = 0; i < length; ++i) span_lo[i] -= key, span_hi[i] -= key;
    };
    // Whether no key is seen on both sides of the boundary before query i.
    const auto apart = [&](int i) { return i == 0 || i == seq || lo[i] >= hi[i - 1]; };
    const auto blind = [&](int i) { return lo[i] >= hi[i]; };
    const auto alone = [&](int i) { return hi[i] - lo[i] == 1 && apart(i) && apart(i + 1); };
    int first = 0;  // of the span that is being filled
    for (int begin = 0, end; begin < seq; begin = end) {
      for (end = begin; end < seq && blind(end);) ++end;
      const bool nothing = end > begin;
      while (!nothing && all_keys && end < seq && alone(end)) ++end;
      const bool padding = !nothing && end - begin >= kPadding;
      if (!nothing && !padding)
        for (end = begin + 1; !apart(end);) ++end;
      // A sample that does not fit into what is left of a block opens a span of its own.
      if (nothing || padding || end - first > kKeys) {
        add(first, begin, false);
        first = begin;
      }
      if (padding) add(begin, end, true);
      if (nothing || padding) first = end;
    }
    add(first, seq, false);
  }
}

struct Task {
  const Span* span;
  int head, start;
  int64_t cost;  // decides the order in which tasks are handed out, and to how many threads
};

// How many scores the queries start .. end-1 of a span have.
int64_t scores_of(const Span& span, int start, int end) {
  int64_t scores = 0;
  for (int i = start; i < std::min(end, span.length); ++i) scores += span.hi[i] - span.lo[i];
  return scores;
}

// Large tasks first, so that no thread is left with one at the end.
void largest_first(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

// A thread has to be worth waking: some ten microseconds of products for each.
int worthwhile(const std::vector<Task>& tasks, int head_dim, int threads) {
  int64_t products = 0;
  for (const Task& task : tasks) products += task.cost * head_dim;
  return int(std::clamp<int64_t>(products >> 18, 1, threads));
}

template <typename T>
Problem<T> problem_of(const int64_t* sizes, const T* q, const T* k, const T* v,
                      const int64_t* strides, double scale) {
  return {int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[4]), int(sizes[5]),
          {q, strides[0], strides[1], strides[2]},
          {k, strides[3], strides[4], strides[5]},
          {v, strides[6], strides[7], strides[8]},
          T(scale)};
}

// Which keys are seen: with `ends`, starts[i] .. ends[i] - 1, whatever tokens these are. Without,
// keys and queries are the same tokens and starts[i] is where the sample of token i begins.
// -1 - query (row * seq + index) where that is impossible, else 0.
template <typename T>
int64_t make_band(Band& band, const Problem<T>& problem, const int32_t* starts,
                  const int32_t* ends, int64_t window) {
  const int rows = problem.rows, seq = problem.seq, keys = problem.key_seq;
  const int64_t count = int64_t(rows) * seq;
  int64_t wrong = ends ? impossible_bound(starts, rows, seq, keys)
                       : impossible_start(starts, rows, seq);
  if (wrong < 0 && ends) wrong = impossible_bound(ends, rows, seq, keys);
  if (wrong >= 0) return -1 - wrong;
  band.lo.assign(starts, starts + count);
  if (ends) {
    band.hi.assign(ends, ends + count);
  } else {
    band.hi.resize(count);
    for (int64_t t = 0; t < count; ++t) {
      band.hi[t] = int(t % seq) + 1;
      band.lo[t] = int(std::max<int64_t>(band.lo[t], band.hi[t] - window));
    }
  }
  cut(band, rows, seq, ends == nullptr);
  return 0;
}

// Both return the number of scores computed in the forward sense (tiles x their area), or
// -1 - query for bounds that are impossible. With `ends` the forward pass goes on from what `out`
// and `lse` hold (zeros and -inf: nothing), and where no key is seen both passes write nothing.
template <typename T>
int64_t forward(const int64_t* sizes, const T* q, const T* k, const T* v, const int64_t* strides,
                const int32_t* starts, const int32_t* ends, double scale, int64_t window, T* out,
                T* lse, int threads) {
  const Problem<T> problem = problem_of(sizes, q, k, v, strides, scale);
  Band band;
  if (const int64_t wrong = make_band(band, problem, starts, ends, window)) return wrong;
  std::vector<Task> tasks;
  for (const Span& span : band.spans) {
    const int run = span.padding ? span.length : kRunQueries;
    for (int start = 0; start < span.length; start += run) {
      const int64_t cost = scores_of(span, start, start + run);
      for (int head = 0; head < problem.heads; ++head)
        tasks.push_back({&span, head, start, cost});
    }
  }
  largest_first(tasks);
  threads = worthwhile(tasks, problem.head_dim, threads);
  int64_t tiles = 0;
#pragma omp parallel num_threads(threads) reduction(+ : tiles)
  {
    Scratch scratch;
    Forward<T> pass(scratch, problem);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < int64_t(tasks.size()); ++t) {
      const auto [span, head, start, cost] = tasks[t];
      if (span->padding)
        forward_padding(problem, *span, head, out, lse);
      else
        tiles += pass.run(problem, *span, head, start, out, lse, ends != nullptr);
    }
  }
  return tiles * kTileRows * kPanel<T>;
}

template <typename T>
int64_t backward(const int64_t* sizes, const T* q, const T* k, const T* v, const int64_t* strides,
                 const int32_t* starts, const int32_t* ends, double scale, int64_t window,
                 const T* out, const T* lse, const T* out_grad, const int64_t* grad_strides,
                 T* q_grad, T* k_grad, T* v_grad, int threads) {
  const Problem<T> problem = problem_of(sizes, q, k, v, strides, scale);
  Band band;
  if (const int64_t wrong = make_band(band, problem, starts, ends, window)) return wrong;
  const Strided<const T> grad{out_grad, grad_strides[0], grad_strides[1], grad_strides[2]};
  std::vector<Task> tasks;
  for (const Span& span : band.spans) {
    const int64_t cost = scores_of(span, 0, span.length);
    for (int head = 0; head < problem.kv_heads; ++head) tasks.push_back({&span, head, 0, cost});
  }
  largest_first(tasks);
  threads = worthwhile(tasks, problem.head_dim, threads);
  int64_t tiles = 0;
#pragma omp parallel num_threads(threads) reduction(+ : tiles)
  {
    Scratch scratch;
    Backward<T> pass(scratch, problem, ceil_div(band.longest, kTileRows) * kTileRows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < int64_t(tasks.size()); ++t) {
      const auto [span, head, start, cost] = tasks[t];
      if (span->padding)
        backward_padding(problem, *span, head, grad, q_grad, k_grad, v_grad);
      else
        tiles += pass.run(problem, *span, head, out, grad, lse, q_grad, k_grad, v_grad);
    }
  }
  return tiles * kTileRows * kPanel<T>;
}

}  // namespace

#define OMNISTEP_ENTRY_POINTS(T)                                                                   \
  extern "C" int64_t attention_forward_##T(                                                        \
      const int64_t* sizes, const T* q, const T* k, const T* v, const int64_t* strides,            \
      const int32_t* starts, const int32_t* ends, double scale, int64_t window, T* out, T* lse,    \
      int threads) {                                                                               \
    return forward<T>(sizes, q, k, v, strides, starts, ends, scale, window, out, lse, threads);    \
  }                                                                                                \
  extern "C" int64_t attention_backward_##T(                                                       \
      const int64_t* sizes, const T* q, const T* k, const T* v, const int64_t* strides,            \
      const int32_t* starts, const int32_t* ends, double scale, int64_t window, const T* out,      \
      const T* lse, const T* out_grad, const int64_t* grad_strides, T* q_grad, T* k_grad,          \
      T* v_grad, int threads) {                                                                    \
    return backward<T>(sizes, q, k, v, strides, starts, ends, scale, window, out, lse, out_grad,   \
                       grad_strides, q_grad, k_grad, v_grad, threads);                             \
  }

OMNISTEP_ENTRY_POINTS(float)
OMNISTEP_ENTRY_POINTS(double)
