// These are the CPU kernels of the training script: Mamba's convolution and selective scan, RMSNorm, SwiGLU and cross
// entropy, each with its gradient. Activations are bfloat16. Parameters, their gradients and the arithmetic are
// float32. One vector holds 16 channels, so the recurrence needs no sum across lanes. The 16 entries of a channel's
// state are in 16 registers. All widths must be multiples of 16. cpu_kernels.py compiles this file. The compiler option
// -ffast-math must not be used, because the function `exp2v` rounds to an integer by adding a large constant.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int W = 16;       // number of float32 lanes in a vector
constexpr int N = 16;       // number of entries of the SSM state per channel (mamba_d_state)
constexpr int CHUNK = 32;   // the forward pass saves the state every CHUNK tokens, for the backward pass
constexpr float LOG2E = 1.44269504f;
using bf16 = uint16_t;
typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef float f16u __attribute__((vector_size(64), aligned(4)));

inline v16 splat(float x) { return x - v16{}; }
inline v16 load(const bf16* p) { return (v16)(__builtin_convertvector(*(const h16*)p, u16v) << 16); }
inline v16 load(const float* p) { return *(const f16u*)p; }
inline void store(float* p, v16 x) { *(f16u*)p = x; }
inline void store(bf16* p, v16 x) {
    u16v u = (u16v)x;
    u += 0x7fff + ((u >> 16) & 1);  // rounds x to the nearest bfloat16, ties to even
    *(h16*)p = __builtin_convertvector(u >> 16, h16);
}
inline void add(float* p, v16 x) { store(p, load(p) + x); }
inline float sum(v16 x) { float s = 0; for (int i = 0; i < W; i++) s += x[i]; return s; }
inline v16 maxv(v16 a, v16 b) { return a > b ? a : b; }
inline v16 exp2v(v16 x) {
    x = maxv(x, splat(-126.f));
    x = x < splat(126.f) ? x : splat(126.f);
    // 1.5 * 2^23: adding this number to a float32 value and subtracting it again rounds the value to an integer
    const v16 magic = splat(12582912.f);
    v16 z = x + magic, r = x - (z - magic);
    v16 p = splat(1.3333558e-3f);
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.f;
    return (v16)((i16v)p + (((i16v)z - (i16v)magic) << 23));
}
inline v16 sigmoid(v16 x) { return 1.f / (1.f + exp2v(x * -LOG2E)); }
// softplus(x) = max(x, 0) + log1p(t) with t = exp(-|x|). The logarithm is computed as 2 atanh(t / (2 + t)).
inline v16 softplus(v16 x) {
    v16 t = exp2v((x > 0.f ? -x : x) * LOG2E), s = t / (2.f + t), q = s * s;
    v16 p = q * (1.f / 11) + 1.f / 9;
    p = p * q + 1.f / 7;
    p = p * q + 1.f / 5;
    p = p * q + 1.f / 3;
    p = p * q + 1.f;
    return maxv(x, splat(0.f)) + 2.f * s * p;
}
inline v16 silu_gradient(v16 x, v16 s) { return s * (1.f + x * (1.f - s)); }
// Each thread sums gradients into the array `own`, which only this thread uses. The function `flush` adds this array to
// the result when the thread has finished.
struct Gradients {
    std::vector<float> own;
    float* total;
    Gradients(float* total, int64_t size) : own(size, 0.f), total(total) {}
    void flush() { for (size_t i = 0; i < own.size(); i++) total[i] += own[i]; }
};
float widen(bf16 x) { uint32_t u = uint32_t(x) << 16; float f; memcpy(&f, &u, 4); return f; }
}  // namespace

// Computes Mamba's causal convolution: u [B,T,D] = silu(conv(first half of xz [B,T,2D])). The second half of xz is
// copied to z [B,T,D]. In the filter w [4,D], w[3] is the factor of the current token. The factors of the three tokens
// before are w[2], w[1] and w[0]; w[0] is the factor of the earliest token.
extern "C" void conv_forward(const bf16* xz, const float* w, const float* bias, bf16* u, bf16* z, int64_t B, int64_t T, int64_t D) {
#pragma omp parallel for
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T; t++) {
            const bf16* row = xz + (b * T + t) * 2 * D;
            bf16* out = u + (b * T + t) * D;
            for (int64_t d = 0; d < D; d += W) {
                v16 s = load(bias + d);
                for (int64_t k = 0; k < 4; k++)
                    if (t - 3 + k >= 0) s += load(w + k * D + d) * load(row + d - (3 - k) * 2 * D);
                store(out + d, s * sigmoid(s));
            }
            memcpy(z + (b * T + t) * D, row + D, D * sizeof(bf16));
        }
}

extern "C" void conv_backward(const bf16* xz, const float* w, const float* bias, const bf16* gu, const bf16* gz, bf16* gxz, float* gw, float* gbias, int64_t B, int64_t T, int64_t D) {
#pragma omp parallel
    {
        Gradients weight(gw, 4 * D), offset(gbias, D);
#pragma omp for
        for (int64_t b = 0; b < B; b++) {
            for (int64_t t = 0; t < T; t++) memcpy(gxz + (b * T + t) * 2 * D + D, gz + (b * T + t) * D, D * sizeof(bf16));
            for (int64_t d = 0; d < D; d += W) {
                v16 next[3] = {};  // gradients of the convolution's output (before SiLU) at the tokens t+1, t+2 and t+3
                v16 sw[4] = {}, sb = {}, wk[4];
                for (int k = 0; k < 4; k++) wk[k] = load(w + k * D + d);
                for (int64_t t = T - 1; t >= 0; t--) {
                    const bf16* row = xz + (b * T + t) * 2 * D + d;
                    v16 x[4], s = load(bias + d);
                    for (int k = 0; k < 4; k++) {
                        x[k] = t - 3 + k >= 0 ? load(row - (3 - k) * 2 * D) : v16{};
                        s += wk[k] * x[k];
                    }
                    v16 g = load(gu + (b * T + t) * D + d) * silu_gradient(s, sigmoid(s));
                    store(gxz + (b * T + t) * 2 * D + d, wk[3] * g + wk[2] * next[0] + wk[1] * next[1] + wk[0] * next[2]);
                    for (int k = 0; k < 4; k++) sw[k] += g * x[k];
                    sb += g;
                    next[2] = next[1], next[1] = next[0], next[0] = g;
                }
                for (int k = 0; k < 4; k++) add(&weight.own[k * D + d], sw[k]);
                add(&offset.own[d], sb);
            }
        }
#pragma omp critical
        { weight.flush(); offset.flush(); }
    }
}

// Computes the selective scan: y = (scan(u, softplus(dt + bias), A, B, C) + skip * u) * silu(z). The argument a2 [N,D]
// is A * log2(e). The state before each chunk of CHUNK tokens is written to states [B,T/CHUNK,D/W,N,W].
extern "C" void scan_forward(const bf16* u, const bf16* dt, const bf16* z, const bf16* Bm, const bf16* Cm, const float* a2, const float* skip, const float* bias, bf16* y, float* states, int64_t B, int64_t T, int64_t D) {
    int64_t chunks = (T + CHUNK - 1) / CHUNK, blocks = D / W;
#pragma omp parallel for collapse(2)
    for (int64_t b = 0; b < B; b++)
        for (int64_t k = 0; k < blocks; k++) {
            v16 h[N] = {}, a[N];
            for (int n = 0; n < N; n++) a[n] = load(a2 + n * D + k * W);
            v16 sk = load(skip + k * W), bi = load(bias + k * W);
            for (int64_t t = 0; t < T; t++) {
                if (t % CHUNK == 0)
                    for (int n = 0; n < N; n++) store(states + (((b * chunks + t / CHUNK) * blocks + k) * N + n) * W, h[n]);
                int64_t i = (b * T + t) * D + k * W, j = (b * T + t) * N;
                v16 uu = load(u + i), step = softplus(load(dt + i) + bi), x = step * uu, acc = sk * uu, gate = load(z + i);
                for (int n = 0; n < N; n++) {
                    h[n] = exp2v(step * a[n]) * h[n] + x * widen(Bm[j + n]);
                    acc += h[n] * widen(Cm[j + n]);
                }
                store(y + i, acc * gate * sigmoid(gate));
            }
        }
}

// Computes the gradients of the selective scan. gB, gC [B,T,N], ga [N,D] (the gradient of A) and gskip, gbias [D] are
// float32. The gradients of A, skip and bias are added to the values that ga, gskip and gbias have before the call.
extern "C" void scan_backward(const bf16* u, const bf16* dt, const bf16* z, const bf16* Bm, const bf16* Cm, const float* a2, const float* skip, const float* bias, const float* states, const bf16* gy, bf16* gu, bf16* gdt, bf16* gz, float* gB, float* gC, float* ga, float* gskip, float* gbias, int64_t B, int64_t T, int64_t D) {
    int64_t chunks = (T + CHUNK - 1) / CHUNK, blocks = D / W;
#pragma omp parallel
    {
        Gradients decay(ga, N * D), through(gskip, D), offset(gbias, D);
        std::vector<v16> carry(blocks * N), E(CHUNK * N), H((CHUNK + 1) * N), sumB(CHUNK * N), sumC(CHUNK * N);
        v16 step[CHUNK], open[CHUNK];
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < B; b++) {
            std::fill(carry.begin(), carry.end(), v16{});
            for (int64_t c = chunks - 1; c >= 0; c--) {
                int64_t first = c * CHUNK, length = T - first < CHUNK ? T - first : CHUNK;
                float Bf[CHUNK * N], Cf[CHUNK * N];
                for (int64_t i = 0; i < length * N; i++) Bf[i] = widen(Bm[(b * T + first) * N + i]), Cf[i] = widen(Cm[(b * T + first) * N + i]);
                std::fill(sumB.begin(), sumB.end(), v16{});
                std::fill(sumC.begin(), sumC.end(), v16{});
                for (int64_t k = 0; k < blocks; k++) {
                    v16 a[N], h[N], sk = load(skip + k * W), bi = load(bias + k * W);
                    for (int n = 0; n < N; n++) {
                        a[n] = load(a2 + n * D + k * W);
                        H[n] = h[n] = load(states + (((b * chunks + c) * blocks + k) * N + n) * W);
                    }
                    for (int64_t t = 0; t < length; t++) {
                        int64_t i = (b * T + first + t) * D + k * W;
                        v16 uu = load(u + i), x, acc = sk * uu;
                        step[t] = softplus(load(dt + i) + bi);
                        x = step[t] * uu;
                        for (int n = 0; n < N; n++) {
                            v16 e = exp2v(step[t] * a[n]);
                            E[t * N + n] = e;
                            h[n] = e * h[n] + x * Bf[t * N + n];
                            H[(t + 1) * N + n] = h[n];
                            acc += h[n] * Cf[t * N + n];
                        }
                        open[t] = acc;
                    }
                    v16 g[N], sa[N] = {}, ss = {}, so = {};
                    for (int n = 0; n < N; n++) g[n] = carry[k * N + n];
                    for (int64_t t = length - 1; t >= 0; t--) {
                        int64_t i = (b * T + first + t) * D + k * W;
                        v16 uu = load(u + i), gate = load(z + i), s = sigmoid(gate), out = load(gy + i);
                        store(gz + i, out * open[t] * silu_gradient(gate, s));
                        v16 go = out * gate * s, x = step[t] * uu, decayed = {}, input = {};
                        for (int n = 0; n < N; n++) {
                            g[n] += go * Cf[t * N + n];
                            sumC[t * N + n] += go * H[(t + 1) * N + n];
                            sumB[t * N + n] += g[n] * x;
                            input += g[n] * Bf[t * N + n];
                            g[n] *= E[t * N + n];
                            v16 q = g[n] * H[t * N + n];
                            sa[n] += q * step[t];
                            decayed += q * a[n];
                        }
                        v16 raw = (decayed * (1.f / LOG2E) + input * uu) * sigmoid(load(dt + i) + bi);
                        store(gdt + i, raw);
                        store(gu + i, go * sk + input * step[t]);
                        ss += go * uu;
                        so += raw;
                    }
                    for (int n = 0; n < N; n++) carry[k * N + n] = g[n], add(&decay.own[n * D + k * W], sa[n]);
                    add(&through.own[k * W], ss);
                    add(&offset.own[k * W], so);
                }
                for (int64_t i = 0; i < length * N; i++) gB[(b * T + first) * N + i] = sum(sumB[i]), gC[(b * T + first) * N + i] = sum(sumC[i]);
            }
        }
#pragma omp critical
        { decay.flush(); through.flush(); offset.flush(); }
    }
}

// Computes RMSNorm: y [M,H] = x / rms(x) * w. The rows of x [M,H] are `stride` elements apart.
extern "C" void norm_forward(const bf16* x, const float* w, bf16* y, float eps, int64_t M, int64_t H, int64_t stride) {
#pragma omp parallel for
    for (int64_t m = 0; m < M; m++) {
        v16 s = {};
        for (int64_t i = 0; i < H; i += W) { v16 v = load(x + m * stride + i); s += v * v; }
        float r = 1.f / std::sqrt(sum(s) / H + eps);
        for (int64_t i = 0; i < H; i += W) store(y + m * H + i, load(x + m * stride + i) * r * load(w + i));
    }
}

extern "C" void norm_backward(const bf16* x, const float* w, const bf16* gy, bf16* gx, float* gw, float eps, int64_t M, int64_t H, int64_t stride) {
#pragma omp parallel
    {
        Gradients weight(gw, H);
#pragma omp for
        for (int64_t m = 0; m < M; m++) {
            v16 s = {}, p = {};
            for (int64_t i = 0; i < H; i += W) {
                v16 v = load(x + m * stride + i);
                s += v * v;
                p += v * load(gy + m * H + i) * load(w + i);
            }
            float r = 1.f / std::sqrt(sum(s) / H + eps), back = sum(p) * r * r * r / H;
            for (int64_t i = 0; i < H; i += W) {
                v16 v = load(x + m * stride + i), g = load(gy + m * H + i);
                store(gx + m * H + i, g * load(w + i) * r - v * back);
                add(&weight.own[i], g * v * r);
            }
        }
#pragma omp critical
        weight.flush();
    }
}

// Computes SwiGLU: y [M,F] = silu(first half) * second half of each row of gate_up [M,2F].
extern "C" void swiglu_forward(const bf16* gate_up, bf16* y, int64_t M, int64_t F) {
#pragma omp parallel for
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < F; i += W) {
            v16 g = load(gate_up + m * 2 * F + i);
            store(y + m * F + i, g * sigmoid(g) * load(gate_up + m * 2 * F + F + i));
        }
}

extern "C" void swiglu_backward(const bf16* gate_up, const bf16* gy, bf16* gx, int64_t M, int64_t F) {
#pragma omp parallel for
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < F; i += W) {
            v16 g = load(gate_up + m * 2 * F + i), s = sigmoid(g), up = load(gate_up + m * 2 * F + F + i), out = load(gy + m * F + i);
            store(gx + m * 2 * F + i, out * up * silu_gradient(g, s));
            store(gx + m * 2 * F + F + i, out * g * s);
        }
}

// Computes the cross entropy losses [M] in nats. Overwrites the logits [M,V] with the gradients of the losses with
// respect to the logits, times `scale`. A row with a target below 0 has the loss 0 and the gradient 0.
extern "C" void cross_entropy(bf16* logits, const int64_t* targets, float* losses, float scale, int64_t M, int64_t V) {
#pragma omp parallel for
    for (int64_t m = 0; m < M; m++) {
        bf16* row = logits + m * V;
        if (targets[m] < 0) { memset(row, 0, V * sizeof(bf16)); losses[m] = 0; continue; }
        v16 top = splat(-1e30f), s = {};
        for (int64_t i = 0; i < V; i += W) top = maxv(top, load(row + i));
        float largest = top[0];
        for (int i = 1; i < W; i++) largest = top[i] > largest ? top[i] : largest;
        for (int64_t i = 0; i < V; i += W) s += exp2v((load(row + i) - largest) * LOG2E);
        float total = sum(s), target = widen(row[targets[m]]);
        losses[m] = std::log(total) + largest - target;
        for (int64_t i = 0; i < V; i += W) {
            v16 g = exp2v((load(row + i) - largest) * LOG2E) * (scale / total);
            if (targets[m] >= i && targets[m] < i + W) g[targets[m] - i] -= scale;
            store(row + i, g);
        }
    }
}
