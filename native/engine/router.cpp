#include "engine/router.h"

#include <algorithm>
#include <cmath>

namespace turbosparse {
namespace {

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

/// From the logits of the experts to the routes of a token, ascending. Of equal scores the first counts as
/// larger.
void choose(const RouterConfig& config, float* logits, std::span<ExpertRoute> routes) {
  const std::span<float> scores(logits, static_cast<std::size_t>(config.experts));
  if (config.sigmoid) {
    for (float& score : scores) score = sigmoid(score);
  } else {
    const float largest = *std::ranges::max_element(scores);
    float sum = 0;
    for (float& score : scores) sum += score = std::exp(score - largest);
    for (float& score : scores) score /= sum;
  }
  float sum = 0;
  for (std::size_t i = 0; i < routes.size(); ++i) {
    const auto is_chosen = [&](std::int32_t expert) {
      return std::ranges::any_of(routes.first(i), [&](const ExpertRoute& r) { return r.expert == expert; });
    };
    std::int32_t best = -1;
    for (std::int32_t e = 0; e < static_cast<std::int32_t>(scores.size()); ++e) {
      if ((best < 0 || logits[e] > logits[best]) && !is_chosen(e)) best = e;
    }
    routes[i] = {best, logits[best]};
    sum += logits[best];
  }
  for (ExpertRoute& route : routes) {
    if (config.normalized) route.factor /= sum;
    route.factor *= config.scale;
  }
  std::ranges::sort(routes, {}, &ExpertRoute::expert);
}

}  // namespace

void score_experts(const Step& step, const LayerWeights& w, const float* state, int index) {
  const Range experts = split(w.router.rows, 1, index, step.thread_count());
  step.kernels().gemv(w.router, {.x = state}, experts.begin, experts.end, step.scratch.expert_logits.data());
}

std::span<const ActiveFfn> choose_ffns(const Step& step, const LayerWeights& w, std::int64_t layer,
                                       const float* normalized, int index) {
  const RouterConfig& config = step.config().router;
  ThreadScratch& thread = step.thread(index);
  if (!w.has_router()) {
    thread.ffns[0] = {&w.ffns[0], 1.0F};
    return thread.ffns;
  }
  const float* logits = step.scratch.expert_logits.data();
  if (!all_finite(logits, config.experts)) note_broken(thread, router_stage(layer));
  std::copy_n(logits, config.experts, thread.expert_scores.data());
  choose(config, thread.expert_scores.data(), thread.routes);
  for (std::size_t i = 0; i < thread.routes.size(); ++i) {
    const ExpertRoute& route = thread.routes[i];
    thread.ffns[i] = {&w.ffns[static_cast<std::size_t>(route.expert)], route.factor};
  }
  if (thread.ffns.size() > thread.routes.size())
    thread.ffns.back() = {&w.ffns.back(), shared_factor(step, w, normalized)};
  return thread.ffns;
}

void route_tokens(const Step& step, const LayerWeights& w, std::int64_t layer, const float* states,
                  Range tokens, int index) {
  const RouterConfig& config = step.config().router;
  const std::int64_t E = config.experts;
  Scratch& s = step.scratch;
  ThreadScratch& thread = step.thread(index);
  float* logits = s.expert_logits.data() + tokens.begin * E;
  step.kernels().gemm(w.router, {.x = states + tokens.begin * w.router.cols}, tokens.size(), 0, E, logits, E,
                      thread.gemm.data());
  if (!all_finite(logits, tokens.size() * E)) note_broken(thread, router_stage(layer));
  const auto used = static_cast<std::size_t>(config.used);
  for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
    choose(config, s.expert_logits.data() + t * E,
           std::span(s.routes).subspan(static_cast<std::size_t>(t) * used, used));
  }
}

void group_tokens(const Step& step) {
  Scratch& s = step.scratch;
  const auto used = static_cast<std::size_t>(step.config().router.used);
  const std::span<const ExpertRoute> routes(s.routes.data(), static_cast<std::size_t>(step.T) * used);
  ExpertGroups& groups = s.groups;
  std::ranges::fill(groups.begin, 0);
  for (const ExpertRoute& route : routes) groups.begin[static_cast<std::size_t>(route.expert) + 1] += 1;
  for (std::size_t e = 1; e < groups.begin.size(); ++e) groups.begin[e] += groups.begin[e - 1];
  std::ranges::copy(groups.begin, groups.next.begin());
  for (std::size_t i = 0; i < routes.size(); ++i) {
    const auto at = static_cast<std::size_t>(groups.next[static_cast<std::size_t>(routes[i].expert)]++);
    groups.tokens[at] = static_cast<std::int32_t>(i / used);
    groups.factors[at] = routes[i].factor;
  }
}

float shared_factor(const Step& step, const LayerWeights& w, const float* normalized) {
  if (w.shared_gate.empty()) return 1.0F;
  const std::int64_t D = step.config().hidden_size;
  const Matrix gate{.data = reinterpret_cast<const std::byte*>(w.shared_gate.data()),
                    .rows = 1,
                    .cols = D,
                    .row_bytes = static_cast<std::size_t>(D) * sizeof(float),
                    .type = WeightType::kF32};
  float logit = 0;
  step.kernels().gemv(gate, {.x = normalized}, 0, 1, &logit);
  return sigmoid(logit);
}

std::int64_t router_bytes(const LayerWeights& w) {
  return w.router.rows * static_cast<std::int64_t>(w.router.row_bytes) +
         static_cast<std::int64_t>(w.shared_gate.size() * sizeof(float));
}

}  // namespace turbosparse
