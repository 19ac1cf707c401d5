/* Loss, gradient and training of a small SiT on one core, for fast_atlas.py: what layerprobe/backbones/sit.py and
   layerprobe/training.py do, in float32, several times faster where a network is so small that torch spends its time
   between operations. Needs AVX-512 and a compiler of the GCC family.

   The shape is fixed when this is compiled: -DWIDTH -DTOKENS -DHEADS -DPATCH -DBATCH (values of a patch rounded up to
   16, like the width, the tokens and no other). Weights are stored as (inputs, outputs), one after the other as in
   `carve`. Samples are stored as patches, (TOKENS, PATCH). */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef PROJECTOR
#define PROJECTOR 0 /* hidden width of the MLP between student and cosine, a multiple of 16; 0 for none */
#endif
#define INLINE static inline __attribute__((always_inline))
#define MAX_DEPTH 32
#define CHUNK 4 /* samples that pass the network together: their activations stay in the cache */
#define ROWS (CHUNK * TOKENS)
#define HEAD (WIDTH / HEADS)

typedef float vec __attribute__((vector_size(64), aligned(4)));
#define V(pointer) (*(vec*)(pointer))

typedef struct {
  int depth, values, classes; /* blocks, values of a patch without the padding, labels without the null label */
} Network;

typedef struct {
  float *patch_w, *patch_b, *time1_w, *time1_b, *time2_w, *time2_b, *labels, *final_mod_w, *final_mod_b, *out_w, *out_b;
  float *mod_w[MAX_DEPTH], *mod_b[MAX_DEPTH], *qkv_w[MAX_DEPTH], *qkv_b[MAX_DEPTH], *proj_w[MAX_DEPTH],
      *proj_b[MAX_DEPTH];
  float *fc1_w[MAX_DEPTH], *fc1_b[MAX_DEPTH], *fc2_w[MAX_DEPTH], *fc2_b[MAX_DEPTH];
  float *projector1_w, *projector1_b, *projector2_w, *projector2_b;
  long count;
} Weights;

static Weights carve(const Network* net, float* flat) {
  Weights w;
  float* next = flat;
#define TAKE(name, n) name = next, next += (n)
  TAKE(w.patch_w, PATCH * WIDTH), TAKE(w.patch_b, WIDTH);
  TAKE(w.time1_w, 256 * WIDTH), TAKE(w.time1_b, WIDTH), TAKE(w.time2_w, WIDTH * WIDTH), TAKE(w.time2_b, WIDTH);
  TAKE(w.labels, (net->classes + 1) * WIDTH);
  for (int l = 0; l < net->depth; l++) {
    TAKE(w.mod_w[l], 6 * WIDTH * WIDTH), TAKE(w.mod_b[l], 6 * WIDTH);
    TAKE(w.qkv_w[l], 3 * WIDTH * WIDTH), TAKE(w.qkv_b[l], 3 * WIDTH);
    TAKE(w.proj_w[l], WIDTH * WIDTH), TAKE(w.proj_b[l], WIDTH);
    TAKE(w.fc1_w[l], 4 * WIDTH * WIDTH), TAKE(w.fc1_b[l], 4 * WIDTH);
    TAKE(w.fc2_w[l], 4 * WIDTH * WIDTH), TAKE(w.fc2_b[l], WIDTH);
  }
  TAKE(w.final_mod_w, 2 * WIDTH * WIDTH), TAKE(w.final_mod_b, 2 * WIDTH);
  TAKE(w.out_w, WIDTH * PATCH), TAKE(w.out_b, PATCH);
  if (PROJECTOR) {
    TAKE(w.projector1_w, WIDTH * PROJECTOR), TAKE(w.projector1_b, PROJECTOR);
    TAKE(w.projector2_w, PROJECTOR * WIDTH), TAKE(w.projector2_b, WIDTH);
  }
  w.count = next - flat;
  return w;
}

long num_weights(const Network* net) { return carve(net, 0).count; }

/* -------------------------------------------------------------------------------------------------------- products */

/* A tile of C = A B, or C += A B: `rows` x 16 `vectors`; A(r, k) = a[r * row_step + k * k_step]. */
INLINE void tile(int rows, int vectors, int k_count, const float* a, int row_step, int k_step, const float* b,
                 int b_row, float* c, int c_row, int add, const float* bias) {
  vec sum[8][2];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < vectors; j++) sum[r][j] = add ? V(c + r * c_row + 16 * j) : bias ? V(bias + 16 * j) : (vec){0};
  for (int k = 0; k < k_count; k++) {
    vec line[2];
    for (int j = 0; j < vectors; j++) line[j] = V(b + (long)k * b_row + 16 * j);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < vectors; j++) sum[r][j] += a[(long)r * row_step + (long)k * k_step] * line[j];
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < vectors; j++) V(c + r * c_row + 16 * j) = sum[r][j];
}

INLINE void product(int m, int n, int k, const float* a, int row_step, int k_step, const float* b, float* c, int add,
                    const float* bias) {
  for (int col = 0; col < n;) {
    const float* bias_here = bias ? bias + col : 0;
    int row = 0, wide = n - col >= 32;
#define TILE(rows, vectors)                                                                                       \
  tile(rows, vectors, k, a + (long)row * row_step, row_step, k_step, b + col, n, c + (long)row * n + col, n, add, \
       bias_here)
    if (wide) {
      for (; row + 8 <= m; row += 8) TILE(8, 2);
      for (; row < m; row++) TILE(1, 2);
    } else {
      for (; row + 8 <= m; row += 8) TILE(8, 1);
      for (; row < m; row++) TILE(1, 1);
    }
    col += wide ? 32 : 16;
  }
}

/* y (m, n) = x (m, k) w (k, n) + bias. */
INLINE void linear(int m, int n, int k, const float* x, const float* w, const float* bias, float* y) {
  product(m, n, k, x, k, 1, w, y, 0, bias);
}

/* dw (k, n) += x^T dy and db (n) += the sum of dy (m, n). */
INLINE void weight_gradient(int m, int n, int k, const float* x, const float* dy, float* dw, float* db) {
  product(k, n, m, x, 1, k, dy, dw, 1, 0);
  for (int r = 0; r < m; r++)
    for (int j = 0; j < n; j++) db[j] += dy[(long)r * n + j];
}

INLINE void transposed(int rows, int cols, const float* a, float* out) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) out[c * rows + r] = a[r * cols + c];
}

/* ----------------------------------------------------------------------------------------------------- nonlinearities
 */

/* e^x to 1e-7, between e^-80 and e^40: 1 / (1 + e^x) then needs no infinities, which -ffast-math forbids. */
INLINE vec exponential(vec x) {
  __m512 v = _mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(-80.f)), _mm512_set1_ps(40.f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 8); /* log2 e */
  /* ln 2 in two parts, so that v - n ln 2 keeps its digits; then Taylor's coefficients up to order 7, slightly tuned.
   */
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v));
  const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (int i = 0; i < 5; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return (vec)_mm512_scalef_ps(p, n);
}

/* The tanh approximation of GELU is x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3). */
#define GELU1 1.5957691216057308f
#define GELU3 (1.5957691216057308f * 0.044715f)

static void gelu(const float* x, float* y) {
  for (int i = 0; i < ROWS * 4 * WIDTH; i += 16)
    V(y + i) = V(x + i) / (1 + exponential(-V(x + i) * (GELU1 + GELU3 * V(x + i) * V(x + i))));
}

static void gelu_backward(const float* x, float* dy) {
  for (int i = 0; i < ROWS * 4 * WIDTH; i += 16) {
    vec v = V(x + i), s = 1 / (1 + exponential(-v * (GELU1 + GELU3 * v * v)));
    V(dy + i) *= s * (1 + v * (1 - s) * (GELU1 + 3 * GELU3 * v * v));
  }
}

static void silu(int n, const float* x, float* y) {
  for (int i = 0; i < n; i++) y[i] = x[i] / (1 + expf(-x[i]));
}

static void silu_backward(int n, const float* x, const float* dy, float* dx) {
  for (int i = 0; i < n; i++) {
    float s = 1 / (1 + expf(-x[i]));
    dx[i] = dy[i] * s * (1 + x[i] * (1 - s));
  }
}

/* Tokens of mean 0 and variance 1, and one over what they were divided by. */
static void normalize(const float* x, float* normal, float* inverse) {
  for (int r = 0; r < ROWS; r++) {
    const float* row = x + r * WIDTH;
    float mean = 0, variance = 0;
    for (int i = 0; i < WIDTH; i++) mean += row[i];
    mean /= WIDTH;
    for (int i = 0; i < WIDTH; i++) variance += (row[i] - mean) * (row[i] - mean);
    inverse[r] = 1 / sqrtf(variance / WIDTH + 1e-6f);
    for (int i = 0; i < WIDTH; i++) normal[r * WIDTH + i] = (row[i] - mean) * inverse[r];
  }
}

/* Adds to dx. */
static void normalize_backward(const float* dnormal, const float* normal, const float* inverse, float* dx) {
  for (int r = 0; r < ROWS; r++) {
    const float *d = dnormal + r * WIDTH, *n = normal + r * WIDTH;
    float mean = 0, along = 0;
    for (int i = 0; i < WIDTH; i++) mean += d[i], along += d[i] * n[i];
    mean /= WIDTH, along /= WIDTH;
    for (int i = 0; i < WIDTH; i++) dx[r * WIDTH + i] += inverse[r] * (d[i] - mean - n[i] * along);
  }
}

/* Shift, scale and gate come by sample, `stride` apart. */
#define EACH(body)                            \
  for (int s = 0; s < CHUNK; s++)             \
    for (int t = 0; t < TOKENS; t++)          \
      for (int i = 0; i < WIDTH; i++) {       \
        int z = (s * TOKENS + t) * WIDTH + i; \
        body;                                 \
      }

static void modulate(const float* normal, const float* shift, const float* scale, int stride, float* out) {
  EACH(out[z] = normal[z] * (1 + scale[s * stride + i]) + shift[s * stride + i])
}

static void modulate_backward(const float* dout, const float* normal, const float* scale, int stride, float* dshift,
                              float* dscale, float* dnormal) {
  EACH(dshift[s * stride + i] += dout[z]; dscale[s * stride + i] += dout[z] * normal[z];
       dnormal[z] = dout[z] * (1 + scale[s * stride + i]))
}

/* x + gate * branch. */
static void gated(const float* x, const float* gate, int stride, const float* branch, float* out) {
  EACH(out[z] = x[z] + gate[s * stride + i] * branch[z])
}

static void gated_backward(const float* dout, const float* gate, int stride, const float* branch, float* dgate,
                           float* dbranch) {
  EACH(dbranch[z] = dout[z] * gate[s * stride + i]; dgate[s * stride + i] += dout[z] * branch[z])
}

/* ---------------------------------------------------------------------------------------------------------- attention
 */

/* Of one sample. Everything is stored by key and channel first, so that a vector holds 16 queries and no sum crosses
   its lanes: probabilities (HEADS, keys, queries). `real` tells which keys count, or is null. */
static void attention(const float* qkv, const uint8_t* real, float* probabilities, float* out) {
  const int row = 3 * WIDTH;
  float q[HEAD * TOKENS], o[HEAD * TOKENS];
  for (int h = 0; h < HEADS; h++) {
    float* p = probabilities + (long)h * TOKENS * TOKENS;
    for (int i = 0; i < TOKENS; i++)
      for (int d = 0; d < HEAD; d++) q[d * TOKENS + i] = qkv[i * row + h * HEAD + d] / sqrtf(HEAD);
    for (int b = 0; b < TOKENS; b += 16) {
      vec largest = (vec){0} - 1e30f, sum = {0};
      for (int j = 0; j < TOKENS; j++) {
        vec logit = {0};
        if (real && !real[j])
          logit -= 1e30f;
        else
          for (int d = 0; d < HEAD; d++) logit += qkv[j * row + WIDTH + h * HEAD + d] * V(q + d * TOKENS + b);
        V(p + j * TOKENS + b) = logit;
        largest = (vec)_mm512_max_ps((__m512)logit, (__m512)largest);
      }
      for (int j = 0; j < TOKENS; j++) {
        vec e = exponential(V(p + j * TOKENS + b) - largest);
        V(p + j * TOKENS + b) = e, sum += e;
      }
      for (int j = 0; j < TOKENS; j++) V(p + j * TOKENS + b) /= sum;
      for (int d = 0; d < HEAD; d++) {
        vec mixed = {0};
        for (int j = 0; j < TOKENS; j++) mixed += qkv[j * row + 2 * WIDTH + h * HEAD + d] * V(p + j * TOKENS + b);
        V(o + d * TOKENS + b) = mixed;
      }
    }
    for (int i = 0; i < TOKENS; i++)
      for (int d = 0; d < HEAD; d++) out[i * WIDTH + h * HEAD + d] = o[d * TOKENS + i];
  }
}

static void attention_backward(const float* qkv, const float* probabilities, const float* dout, float* dqkv) {
  const int row = 3 * WIDTH;
  float d_o[HEAD * TOKENS], p_t[TOKENS * TOKENS], ds[TOKENS * TOKENS], ds_t[TOKENS * TOKENS];
  float dq[HEAD * TOKENS], dk[HEAD * TOKENS], dv[HEAD * TOKENS];
  for (int h = 0; h < HEADS; h++) {
    const float* p = probabilities + (long)h * TOKENS * TOKENS;
    for (int i = 0; i < TOKENS; i++)
      for (int d = 0; d < HEAD; d++) d_o[d * TOKENS + i] = dout[i * WIDTH + h * HEAD + d];
    for (int b = 0; b < TOKENS; b += 16) {
      vec along = {0};
      for (int j = 0; j < TOKENS; j++) {
        vec dp = {0};
        for (int d = 0; d < HEAD; d++) dp += qkv[j * row + 2 * WIDTH + h * HEAD + d] * V(d_o + d * TOKENS + b);
        V(ds + j * TOKENS + b) = dp, along += dp * V(p + j * TOKENS + b);
      }
      for (int j = 0; j < TOKENS; j++)
        V(ds + j * TOKENS + b) = V(p + j * TOKENS + b) * (V(ds + j * TOKENS + b) - along) / sqrtf(HEAD);
      for (int d = 0; d < HEAD; d++) {
        vec sum = {0};
        for (int j = 0; j < TOKENS; j++) sum += qkv[j * row + WIDTH + h * HEAD + d] * V(ds + j * TOKENS + b);
        V(dq + d * TOKENS + b) = sum;
      }
    }
    transposed(TOKENS, TOKENS, p, p_t), transposed(TOKENS, TOKENS, ds, ds_t);
    for (int b = 0; b < TOKENS; b += 16)
      for (int d = 0; d < HEAD; d++) {
        vec value = {0}, key = {0};
        for (int i = 0; i < TOKENS; i++) {
          value += dout[i * WIDTH + h * HEAD + d] * V(p_t + i * TOKENS + b);
          key += qkv[i * row + h * HEAD + d] * V(ds_t + i * TOKENS + b);
        }
        V(dv + d * TOKENS + b) = value, V(dk + d * TOKENS + b) = key;
      }
    for (int i = 0; i < TOKENS; i++)
      for (int d = 0; d < HEAD; d++) {
        float* to = dqkv + i * row + h * HEAD + d;
        to[0] = dq[d * TOKENS + i], to[WIDTH] = dk[d * TOKENS + i], to[2 * WIDTH] = dv[d * TOKENS + i];
      }
  }
}

/* -------------------------------------------------------------------------------------------------- loss and gradient
 */

/* What is kept of a chunk and a block for the way back. */
typedef struct {
  float normal1[ROWS * WIDTH], inverse1[ROWS], input1[ROWS * WIDTH], qkv[ROWS * 3 * WIDTH];
  float probabilities[CHUNK * HEADS * TOKENS * TOKENS], mixed[ROWS * WIDTH], attended[ROWS * WIDTH];
  float normal2[ROWS * WIDTH], inverse2[ROWS], input2[ROWS * WIDTH];
  float hidden[ROWS * 4 * WIDTH], active[ROWS * 4 * WIDTH], mlp[ROWS * WIDTH];
} Kept;

/* Weights as (outputs, inputs), for the gradients of inputs. */
typedef struct {
  float qkv[3 * WIDTH * WIDTH], proj[WIDTH * WIDTH], fc1[4 * WIDTH * WIDTH], fc2[4 * WIDTH * WIDTH];
} Turned;

typedef struct {
  Kept kept[MAX_DEPTH];
  Turned turned[MAX_DEPTH];
  float out_turned[WIDTH * PATCH], stream[MAX_DEPTH + 1][ROWS * WIDTH];
  float mod[MAX_DEPTH][BATCH * 6 * WIDTH], dmod[MAX_DEPTH][BATCH * 6 * WIDTH], final_mod[BATCH * 2 * WIDTH],
      dfinal_mod[BATCH * 2 * WIDTH];
  float sinusoids[BATCH * 256], time1[BATCH * WIDTH], time2[BATCH * WIDTH], c[BATCH * WIDTH], active_c[BATCH * WIDTH],
      dc[BATCH * WIDTH], d1[BATCH * WIDTH];
  float x_t[ROWS * PATCH], out[ROWS * PATCH], dout[ROWS * PATCH], middle[ROWS * WIDTH], dx[ROWS * WIDTH],
      d2[ROWS * WIDTH], d3[ROWS * WIDTH], d4[ROWS * WIDTH];
  float dqkv[ROWS * 3 * WIDTH], dhidden[ROWS * 4 * WIDTH], final_normal[ROWS * WIDTH], final_inverse[ROWS],
      final_input[ROWS * WIDTH], pull[ROWS * WIDTH];
  float mod_turned[6 * WIDTH * WIDTH];
  /* The projector; one element more, since C has no empty arrays. */
  float inside[ROWS * PROJECTOR + 1], active[ROWS * PROJECTOR + 1], dinside[ROWS * PROJECTOR + 1], projected[ROWS * WIDTH],
      dprojected[ROWS * WIDTH], projector_turned[WIDTH * PROJECTOR + 1];
} Memory;

/* All samples of the data, (n, TOKENS, PATCH); `element` and `token` tell what is real of padded ones, or are null. */
typedef struct {
  const float *position, *samples;
  const uint8_t *element, *token;
} Data;

/* One step's batch: rows of the data, noise (BATCH, TOKENS, PATCH), noise levels, native times, labels. */
typedef struct {
  const int* rows;
  const float *noise, *level, *time;
  const int* label;
} Step;

/* The pair, -1 for none; samples outside [low, high] are not aligned. */
typedef struct {
  int student, teacher;
  float weight, low, high;
} Alignment;

static void block_forward(const Weights* w, int l, const uint8_t* const* real, const float* mod, const float* x,
                          Kept* k, float* middle, float* out) {
  const int m = 6 * WIDTH;
  normalize(x, k->normal1, k->inverse1);
  modulate(k->normal1, mod, mod + WIDTH, m, k->input1);
  linear(ROWS, 3 * WIDTH, WIDTH, k->input1, w->qkv_w[l], w->qkv_b[l], k->qkv);
  for (int s = 0; s < CHUNK; s++)
    attention(k->qkv + s * TOKENS * 3 * WIDTH, real[s], k->probabilities + (long)s * HEADS * TOKENS * TOKENS,
              k->mixed + s * TOKENS * WIDTH);
  linear(ROWS, WIDTH, WIDTH, k->mixed, w->proj_w[l], w->proj_b[l], k->attended);
  gated(x, mod + 2 * WIDTH, m, k->attended, middle);
  normalize(middle, k->normal2, k->inverse2);
  modulate(k->normal2, mod + 3 * WIDTH, mod + 4 * WIDTH, m, k->input2);
  linear(ROWS, 4 * WIDTH, WIDTH, k->input2, w->fc1_w[l], w->fc1_b[l], k->hidden);
  gelu(k->hidden, k->active);
  linear(ROWS, WIDTH, 4 * WIDTH, k->active, w->fc2_w[l], w->fc2_b[l], k->mlp);
  gated(middle, mod + 5 * WIDTH, m, k->mlp, out);
}

/* dx is that of the output, and then that of the input. */
static void block_backward(const Weights* g, int l, const float* mod, float* dmod, const Kept* k, const Turned* turned,
                           Memory* mem) {
  const int m = 6 * WIDTH;
  gated_backward(mem->dx, mod + 5 * WIDTH, m, k->mlp, dmod + 5 * WIDTH, mem->d2);
  weight_gradient(ROWS, WIDTH, 4 * WIDTH, k->active, mem->d2, g->fc2_w[l], g->fc2_b[l]);
  linear(ROWS, 4 * WIDTH, WIDTH, mem->d2, turned->fc2, 0, mem->dhidden);
  gelu_backward(k->hidden, mem->dhidden);
  weight_gradient(ROWS, 4 * WIDTH, WIDTH, k->input2, mem->dhidden, g->fc1_w[l], g->fc1_b[l]);
  linear(ROWS, WIDTH, 4 * WIDTH, mem->dhidden, turned->fc1, 0, mem->d3);
  modulate_backward(mem->d3, k->normal2, mod + 4 * WIDTH, m, dmod + 3 * WIDTH, dmod + 4 * WIDTH, mem->d4);
  normalize_backward(mem->d4, k->normal2, k->inverse2, mem->dx);
  gated_backward(mem->dx, mod + 2 * WIDTH, m, k->attended, dmod + 2 * WIDTH, mem->d2);
  weight_gradient(ROWS, WIDTH, WIDTH, k->mixed, mem->d2, g->proj_w[l], g->proj_b[l]);
  linear(ROWS, WIDTH, WIDTH, mem->d2, turned->proj, 0, mem->d3);
  for (int s = 0; s < CHUNK; s++)
    attention_backward(k->qkv + s * TOKENS * 3 * WIDTH, k->probabilities + (long)s * HEADS * TOKENS * TOKENS,
                       mem->d3 + s * TOKENS * WIDTH, mem->dqkv + s * TOKENS * 3 * WIDTH);
  weight_gradient(ROWS, 3 * WIDTH, WIDTH, k->input1, mem->dqkv, g->qkv_w[l], g->qkv_b[l]);
  linear(ROWS, WIDTH, 3 * WIDTH, mem->dqkv, turned->qkv, 0, mem->d3);
  modulate_backward(mem->d3, k->normal1, mod + WIDTH, m, dmod, dmod + WIDTH, mem->d4);
  normalize_backward(mem->d4, k->normal1, k->inverse1, mem->dx);
}

/* The gradient of -weight * mean cosine on the student's tokens of one sample; returns its mean cosine. */
static double alignment_gradient(const float* student, const float* teacher, const uint8_t* real, float weight,
                                 float* gradient) {
  int count = 0;
  double sum = 0;
  for (int t = 0; t < TOKENS; t++) count += real ? real[t] : 1;
  for (int t = 0; t < TOKENS; t++) {
    const float *u = student + t * WIDTH, *v = teacher + t * WIDTH;
    float uu = 0, vv = 0, uv = 0;
    if (real && !real[t]) continue;
    for (int i = 0; i < WIDTH; i++) uu += u[i] * u[i], vv += v[i] * v[i], uv += u[i] * v[i];
    float by_u = 1 / sqrtf(uu), by_v = 1 / sqrtf(vv), cosine = uv * by_u * by_v;
    sum += cosine / count;
    for (int i = 0; i < WIDTH; i++)
      gradient[t * WIDTH + i] = -weight / count / BATCH * by_u * (v[i] * by_v - cosine * u[i] * by_u);
  }
  return sum;
}

/* Writes the gradient of -weight * mean cosine on the student's tokens of a chunk to `pull`, and adds that of the
   projector; returns the chunk's part of the mean cosine. */
static double alignment(const Weights* w, const Weights* g, const float* student, const float* teacher,
                        const uint8_t* const* real, const float* level, const Alignment* pair, Memory* mem) {
  const float* compared = PROJECTOR ? mem->projected : student;
  float* gradient = PROJECTOR ? mem->dprojected : mem->pull;
  double cosine = 0;
  if (PROJECTOR) {
    linear(ROWS, PROJECTOR, WIDTH, student, w->projector1_w, w->projector1_b, mem->inside);
    silu(ROWS * PROJECTOR, mem->inside, mem->active);
    linear(ROWS, WIDTH, PROJECTOR, mem->active, w->projector2_w, w->projector2_b, mem->projected);
  }
  memset(gradient, 0, ROWS * WIDTH * sizeof(float));
  for (int s = 0; s < CHUNK; s++) {
    const int at = s * TOKENS * WIDTH;
    if (level[s] >= pair->low && level[s] <= pair->high)
      cosine +=
          alignment_gradient(compared + at, teacher + at, real[s], pair->weight, gradient + at) / BATCH;
  }
  if (PROJECTOR) {
    weight_gradient(ROWS, WIDTH, PROJECTOR, mem->active, gradient, g->projector2_w, g->projector2_b);
    transposed(PROJECTOR, WIDTH, w->projector2_w, mem->projector_turned);
    linear(ROWS, PROJECTOR, WIDTH, gradient, mem->projector_turned, 0, mem->dinside);
    silu_backward(ROWS * PROJECTOR, mem->inside, mem->dinside, mem->dinside);
    weight_gradient(ROWS, PROJECTOR, WIDTH, student, mem->dinside, g->projector1_w, g->projector1_b);
    transposed(WIDTH, PROJECTOR, w->projector1_w, mem->projector_turned);
    linear(ROWS, WIDTH, PROJECTOR, mem->dinside, mem->projector_turned, 0, mem->pull);
  }
  return cosine;
}

/* Mean squared error of the velocity (data - noise), and in `gradient` that of it and of the alignment. */
static double loss_and_gradient(const Network* net, float* flat, float* gradient, const Data* data, const Step* step,
                                const Alignment* pair, Memory* mem, double* cosine) {
  const int depth = net->depth;
  const long cells = TOKENS * PATCH;
  Weights w = carve(net, flat), g = carve(net, gradient);
  double loss = 0;
  *cosine = 0;
  memset(gradient, 0, w.count * sizeof(float));
  for (int b = 0; b < BATCH; b++)
    for (int i = 0; i < 128; i++) {
      float angle = step->time[b] * expf(-9.210340371976184f / 128 * i); /* log 10 000 */
      mem->sinusoids[b * 256 + i] = cosf(angle), mem->sinusoids[b * 256 + 128 + i] = sinf(angle);
    }
  linear(BATCH, WIDTH, 256, mem->sinusoids, w.time1_w, w.time1_b, mem->time1);
  silu(BATCH * WIDTH, mem->time1, mem->time2);
  linear(BATCH, WIDTH, WIDTH, mem->time2, w.time2_w, w.time2_b, mem->c);
  for (int b = 0; b < BATCH; b++)
    for (int i = 0; i < WIDTH; i++) mem->c[b * WIDTH + i] += w.labels[step->label[b] * WIDTH + i];
  silu(BATCH * WIDTH, mem->c, mem->active_c);
  for (int l = 0; l < depth; l++) {
    linear(BATCH, 6 * WIDTH, WIDTH, mem->active_c, w.mod_w[l], w.mod_b[l], mem->mod[l]);
    memset(mem->dmod[l], 0, sizeof mem->dmod[l]);
    transposed(WIDTH, 3 * WIDTH, w.qkv_w[l], mem->turned[l].qkv),
        transposed(WIDTH, WIDTH, w.proj_w[l], mem->turned[l].proj);
    transposed(WIDTH, 4 * WIDTH, w.fc1_w[l], mem->turned[l].fc1),
        transposed(4 * WIDTH, WIDTH, w.fc2_w[l], mem->turned[l].fc2);
  }
  linear(BATCH, 2 * WIDTH, WIDTH, mem->active_c, w.final_mod_w, w.final_mod_b, mem->final_mod);
  memset(mem->dfinal_mod, 0, sizeof mem->dfinal_mod);
  transposed(WIDTH, PATCH, w.out_w, mem->out_turned);

  for (int first = 0; first < BATCH; first += CHUNK) {
    const float *x[CHUNK], *noise = step->noise + first * cells;
    const uint8_t *element[CHUNK], *real[CHUNK];
    for (int s = 0; s < CHUNK; s++) {
      long row = step->rows[first + s];
      float level = step->level[first + s];
      x[s] = data->samples + row * cells;
      element[s] = data->element ? data->element + row * cells : 0;
      real[s] = data->token ? data->token + row * TOKENS : 0;
      for (int i = 0; i < cells; i++)
        mem->x_t[s * cells + i] =
            element[s] && !element[s][i] ? 0 : (1 - level) * x[s][i] + level * noise[s * cells + i];
    }
    linear(ROWS, WIDTH, PATCH, mem->x_t, w.patch_w, w.patch_b, mem->stream[0]);
    for (int i = 0; i < ROWS * WIDTH; i++) mem->stream[0][i] += data->position[i % (TOKENS * WIDTH)];
    for (int l = 0; l < depth; l++)
      block_forward(&w, l, real, mem->mod[l] + first * 6 * WIDTH, mem->stream[l], &mem->kept[l], mem->middle,
                    mem->stream[l + 1]);
    const float* mod = mem->final_mod + first * 2 * WIDTH;
    normalize(mem->stream[depth], mem->final_normal, mem->final_inverse);
    modulate(mem->final_normal, mod, mod + WIDTH, 2 * WIDTH, mem->final_input);
    linear(ROWS, PATCH, WIDTH, mem->final_input, w.out_w, w.out_b, mem->out);

    for (int s = 0; s < CHUNK; s++) {
      long count = 0;
      double sum = 0;
      for (int i = 0; i < cells; i++) count += element[s] ? element[s][i] : i % PATCH < net->values;
      for (int i = 0; i < cells; i++) {
        float error = 0;
        if (i % PATCH < net->values && (!element[s] || element[s][i]))
          error = mem->out[s * cells + i] - (x[s][i] - noise[s * cells + i]);
        sum += error * error;
        mem->dout[s * cells + i] = 2 * error / count / BATCH;
      }
      loss += sum / count / BATCH;
    }
    weight_gradient(ROWS, PATCH, WIDTH, mem->final_input, mem->dout, g.out_w, g.out_b);
    linear(ROWS, WIDTH, PATCH, mem->dout, mem->out_turned, 0, mem->d3);
    float* dfinal = mem->dfinal_mod + first * 2 * WIDTH;
    modulate_backward(mem->d3, mem->final_normal, mod + WIDTH, 2 * WIDTH, dfinal, dfinal + WIDTH, mem->d4);
    memset(mem->dx, 0, sizeof mem->dx);
    normalize_backward(mem->d4, mem->final_normal, mem->final_inverse, mem->dx);
    if (pair->student >= 0)
      *cosine += alignment(&w, &g, mem->stream[pair->student + 1], mem->stream[pair->teacher + 1], real,
                           step->level + first, pair, mem);
    for (int l = depth - 1; l >= 0; l--) {
      if (l == pair->student)
        for (int i = 0; i < ROWS * WIDTH; i++) mem->dx[i] += mem->pull[i];
      block_backward(&g, l, mem->mod[l] + first * 6 * WIDTH, mem->dmod[l] + first * 6 * WIDTH, &mem->kept[l],
                     &mem->turned[l], mem);
    }
    weight_gradient(ROWS, WIDTH, PATCH, mem->x_t, mem->dx, g.patch_w, g.patch_b);
  }

  memset(mem->dc, 0, sizeof mem->dc);
  for (int l = 0; l <= depth; l++) {
    int n = l < depth ? 6 * WIDTH : 2 * WIDTH;
    const float* dmod = l < depth ? mem->dmod[l] : mem->dfinal_mod;
    weight_gradient(BATCH, n, WIDTH, mem->active_c, dmod, l < depth ? g.mod_w[l] : g.final_mod_w,
                    l < depth ? g.mod_b[l] : g.final_mod_b);
    transposed(WIDTH, n, l < depth ? w.mod_w[l] : w.final_mod_w, mem->mod_turned);
    product(BATCH, WIDTH, n, dmod, n, 1, mem->mod_turned, mem->dc, 1, 0);
  }
  silu_backward(BATCH * WIDTH, mem->c, mem->dc, mem->dc);
  for (int b = 0; b < BATCH; b++)
    for (int i = 0; i < WIDTH; i++) g.labels[step->label[b] * WIDTH + i] += mem->dc[b * WIDTH + i];
  weight_gradient(BATCH, WIDTH, WIDTH, mem->time2, mem->dc, g.time2_w, g.time2_b);
  transposed(WIDTH, WIDTH, w.time2_w, mem->mod_turned);
  linear(BATCH, WIDTH, WIDTH, mem->dc, mem->mod_turned, 0, mem->d1);
  silu_backward(BATCH * WIDTH, mem->time1, mem->d1, mem->d1);
  weight_gradient(BATCH, WIDTH, 256, mem->sinusoids, mem->d1, g.time1_w, g.time1_b);
  return loss;
}

/* ----------------------------------------------------------------------------------------------------------- training
 */

static Memory* memory(void) {
  void* place;
  if (posix_memalign(&place, 64, sizeof(Memory))) abort();
  return place;
}

double one_gradient(const Network* net, float* flat, float* gradient, const Data* data, const Step* step,
                    const Alignment* pair, double* cosine) {
  Memory* mem = memory();
  double loss = loss_and_gradient(net, flat, gradient, data, step, pair, mem, cosine);
  free(mem);
  return loss;
}

/* AdamW without weight decay, on gradients of at most the norm `clip` (0: any), and averaged weights, for steps `from` to `to`; `step` holds the batches of all of them.
   Writes each step's loss and mean cosine. */
void train(const Network* net, float* flat, float* first, float* second, float* average, const Data* data,
           const Step* step, const Alignment* pair, int from, int to, float learning_rate, int warmup, float clip,
           float decay, double* losses, double* cosines) {
  const long n = num_weights(net), cells = TOKENS * PATCH;
  const float beta1 = 0.9f, beta2 = 0.999f;
  float* gradient = malloc(n * sizeof(float));
  Memory* mem = memory();
  for (int k = from; k < to; k++) {
    long at = (long)(k - from) * BATCH;
    Step here = {step->rows + at, step->noise + at * cells, step->level + at, step->time + at, step->label + at};
    losses[k - from] = loss_and_gradient(net, flat, gradient, data, &here, pair, mem, &cosines[k - from]);
    float rate = learning_rate * fminf(1, (k + 1.0f) / (warmup + 1)), keep = fminf(decay, (k + 2.0f) / (k + 11.0f));
    double square = 0;
    for (long i = 0; i < n; i++) square += (double)gradient[i] * gradient[i];
    float share = clip ? fmin(1, clip / (sqrt(square) + 1e-6)) : 1;
    float size = rate / (1 - pow(beta1, k + 1)), root = 1 / sqrt(1 - pow(beta2, k + 1));
    for (long i = 0; i < n; i++) {
      float slope = share * gradient[i];
      first[i] += (1 - beta1) * (slope - first[i]);
      second[i] = beta2 * second[i] + (1 - beta2) * slope * slope;
      flat[i] -= size * first[i] / (sqrtf(second[i]) * root + 1e-8f);
      average[i] += (1 - keep) * (flat[i] - average[i]);
    }
  }
  free(gradient), free(mem);
}
