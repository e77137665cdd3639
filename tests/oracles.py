"""Every formula of minigrpo.loss once more: slow loops over Python floats, written from the papers'
equations alone.

Gradients come from dual numbers: a `Dual` carries the value and its derivatives with respect to
    every log-prob, and each
operation applies its rule of calculus, so that an oracle for a loss is an oracle for its gradient.
"""

import math


class Dual:
    """A number and its derivatives, {variable: d value / d variable}."""

    def __init__(self, value, slope=()):
        self.value, self.slope = value, dict(slope)

    def _chain(self, value, own, other=None, others=0.0):
        slope = {name: own * d for name, d in self.slope.items()}
        for name, d in (other.slope if isinstance(other, Dual) else {}).items():
            slope[name] = slope.get(name, 0.0) + others * d
        return Dual(value, slope)

    def __add__(self, other):
        return self._chain(self.value + sg(other), 1.0, other, 1.0)

    def __mul__(self, other):
        return self._chain(self.value * sg(other), sg(other), other, self.value)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + other * -1.0

    def __rsub__(self, other):
        return self * -1.0 + other

    def __truediv__(self, number):
        return self * (1 / number)

    def __lt__(self, other):
        return self.value < sg(other)

    def __gt__(self, other):
        return self.value > sg(other)


def sg(x):
    """Stop the gradient."""
    return x.value if isinstance(x, Dual) else x


def exp(x):
    return x._chain(math.exp(x.value), math.exp(x.value)) if isinstance(x, Dual) else math.exp(x)


def sigmoid(x):
    y = 1 / (1 + math.exp(-sg(x)))
    return x._chain(y, y * (1 - y)) if isinstance(x, Dual) else y


def variables(rows):
    """Lists of floats -> lists of Duals, the variable at row i and token t named (i, t)."""
    return [
        [Dual(value, {(i, t): 1.0}) for t, value in enumerate(row)] for i, row in enumerate(rows)
    ]


def advantages(rewards, valid, scale, leave_one_out, eps):
    """DeepSeekMath 4.1.2; RLOO; Dr. GRPO; 2508.08221."""
    every = [r for row, ok in zip(rewards, valid) for r, v in zip(row, ok) if v]
    out = []
    for row, ok in zip(rewards, valid):
        group = [r for r, v in zip(row, ok) if v]
        result = []
        for r, v in zip(row, ok):
            if not v or len(group) < 2 or len(set(group)) == 1:
                result.append(0.0)
                continue
            if leave_one_out:  # r minus the mean of the others
                a = r - (sum(group) - r) / (len(group) - 1)
            else:
                a = r - sum(group) / len(group)
            if scale != "none":
                a /= deviation(group if scale == "group" else every) + eps
            result.append(a)
        out.append(result)
    return out


def deviation(values):
    """Unbiased standard deviation."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def overlong_penalty(length, longest, buffer):
    """DAPO, eq. 13."""
    if length <= longest - buffer:
        return 0.0
    return ((longest - buffer) - length) / buffer if length <= longest else -1.0


def kl(logp, ref, estimator):
    """Schulman's k1, k2, k3 of KL(policy || reference), with r = ref / policy: -log r, (log r)^2 /
    2, r - 1 - log r.
    """
    log_r = ref - logp
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r * log_r / 2
    return exp(log_r) - 1.0 - log_r


def clipped(rho, a, low, high, dual):
    """The negative of PPO's eq. 7, and of dual-clip PPO where a < 0: max(min(rho A, clip(rho) A), c
    A).
    """
    objective = min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
    return -max(objective, dual * a) if dual is not None and a < 0 else -objective


def ratios(logprob, old, mask, ratio_level):
    """rho at each token: its own, or (GSPO) the answer's (prod rho)^(1 / |o|)."""
    out = []
    for lp, lo, m in zip(logprob, old, mask):
        logs = [a - b if on else None for a, b, on in zip(lp, lo, m)]
        own = [x for x in logs if x is not None]
        if ratio_level == "sequence" and own:
            mean = sum(own) / len(own)
            logs = [x if x is None else mean for x in logs]
        out.append([None if x is None else exp(x) for x in logs])
    return out


def policy_terms(
    logprob,
    old,
    advantage,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=None,
    ratio_level="token",
    surrogate="clip",
    cispo_cap=5.0,
    dppo_delta=0.2,
    dppo_cap=20.0,
    sapo_tau_up=1.0,
    sapo_tau_down=1.05,
):
    """The loss of each token, None where masked."""
    out = []
    rows = ratios(logprob, old, mask, ratio_level)
    for i, (lp, row, a) in enumerate(zip(logprob, rows, advantage)):
        terms = []
        for t, rho in enumerate(row):
            if rho is None:
                terms.append(None)
            elif surrogate == "cispo":  # MiniMax-M1, without a lower bound
                terms.append(lp[t] * (-min(sg(rho), cispo_cap) * a))
            elif surrogate == "dppo":  # binary total variation, of probabilities
                moved = math.exp(sg(lp[t])) - math.exp(old[i][t])
                beyond = moved > dppo_delta if a > 0 else moved < -dppo_delta
                terms.append(0.0 if beyond else lp[t] * (-min(sg(rho), dppo_cap) * a))
            elif surrogate == "sapo":
                tau = sapo_tau_up if a > 0 else sapo_tau_down
                terms.append(sigmoid((rho - 1.0) * tau) * (-4 / tau * a))
            else:
                terms.append(clipped(rho, a, clip_low, clip_high, dual_clip))
        out.append(terms)
    return out


def mean(terms, aggregation, max_tokens=None, denominator=None):
    """DAPO, eq. 8; DeepSeekMath, eq. 3; Dr. GRPO: over tokens, over answers of their means, by a
    constant.
    """
    rows = [[x for x in row if x is not None] for row in terms]
    if aggregation == "sequence-mean":
        rows, count = [sum(row) / len(row) for row in rows if row], sum(bool(row) for row in rows)
    else:
        count = sum(map(len, rows)) if aggregation == "token-mean" else len(rows) * max_tokens
        rows = [sum(row, 0.0) for row in rows]
    count = count if denominator is None else denominator
    return sum(rows, 0.0) / count if count else 0.0


def grpo(
    logprob,
    old,
    advantage,
    mask,
    *,
    ref=None,
    kl_coef=0.0,
    kl_estimator="k3",
    kl_ratio=False,
    rollout=None,
    rollout_level="token",
    rollout_floor=0.0,
    rollout_cap=2.0,
    rollout_outside="cut",
    off_policy_delta=None,
    entropy=None,
    entropy_coef=0.0,
    aggregation="token-mean",
    denominator=None,
    max_tokens=None,
    **clip,
):
    """The whole loss of Duals or floats logprob [R][T]; what lies behind the mask is never
    touched.
    """
    terms = policy_terms(logprob, old, advantage, mask, **clip)
    rho = ratios(logprob, old, mask, "token")
    for i, row in enumerate(terms):
        for t, term in enumerate(row):
            if term is None:
                continue
            on = [u for u, there in enumerate(mask[i]) if there]
            if rollout is not None:
                among = on if rollout_level == "sequence" else [t]
                weight = math.exp(sum(old[i][u] - rollout[i][u] for u in among))
                kept = min(max(weight, rollout_floor), rollout_cap)
                if rollout_outside == "drop" and kept != weight:
                    kept = 0.0
                term = term * kept
            if off_policy_delta is not None and advantage[i] < 0:
                sampled = old if rollout is None else rollout
                drift = [sampled[i][u] - sg(logprob[i][u]) for u in on]
                term = 0.0 if sum(drift) / len(drift) > off_policy_delta else term
            if entropy is not None:
                term = term + entropy[i][t] * -entropy_coef
            if kl_coef:
                k = kl(logprob[i][t], ref[i][t], kl_estimator)
                term = term + (rho[i][t] * k if kl_ratio else k) * kl_coef
            row[t] = term
    return mean(terms, aggregation, max_tokens, denominator)
