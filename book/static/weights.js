/* The objective of one anchor and its gradient, in doubles and log space, as hcl.losses.hard has it.

Pure functions on plain arrays, exported as window.hclWeights; nothing here touches the page.
A vector of length zero stays zero: its scores are 0 and it gets no force. */
(function (global) {
  "use strict";

  /* log of the sum of e^a; -Infinity for no terms. */
  function lse(a) {
    const top = Math.max(...a);
    if (!Number.isFinite(top)) return top;
    return top + Math.log(a.reduce((sum, x) => sum + Math.exp(x - top), 0));
  }

  /* log(e^x - e^y) with its derivatives in x and y; bound where y >= x, as there is none. */
  function logMinus(x, y) {
    const gap = y - x;
    if (!(gap < 0)) return { value: -Infinity, dx: 0, dy: 0, bound: true };
    const rest = -Math.expm1(gap);
    return { value: x + Math.log(rest), dx: 1 / rest, dy: -Math.exp(gap) / rest, bound: false };
  }

  /* The larger of a value and a floor, without derivative at the floor. */
  function atLeast(term, floor) {
    if (!(term.bound || term.value < floor)) return term;
    return { value: floor, dx: 0, dy: 0, bound: true };
  }

  /* Loss of an anchor from the score p of its positive and the scores s of its negatives.

  debias: "none", "released" or "separate"; detach: no gradient through the weights q. Hands back
  q, logNg, loss, clamped, and the derivatives of the loss: dp, and ds of every negative. */
  function anchor(p, s, { temperature: t, beta: hardness = 0, tauPlus = 0, detach = false, debias = "released" }) {
    const M = s.length;
    if (!M) return { q: [], logNg: -Infinity, loss: 0, clamped: false, dp: 0, ds: [] };
    const tau = debias === "none" ? 0 : tauPlus;
    const beta = Math.min(hardness, 1e300); // so that no product is infinite
    // log-sum-exps relative to the hardest negative, whose own terms are then 1 for every beta
    const hardest = Math.max(...s);
    const easier = s.map((x) => x - hardest);
    const A = lse(easier.map((x) => (1 + beta) * x));
    const C = lse(easier.map((x) => beta * x));
    const q = easier.map((x) => Math.exp(beta * x - C));
    const pi = easier.map((x) => Math.exp((1 + beta) * x - A));
    const logMean = hardest + A - C;
    // value of log g after debiasing; its derivatives in log A, in log C and in p
    let g = { value: logMean, dA: 1, dC: -1, dp: 0, bound: false };
    if (tau > 0 && (debias === "released" || beta === 0)) {
      const difference = logMinus(logMean, Math.log(tau) + p);
      difference.value -= Math.log1p(-tau);
      const { value, dx, dy, bound } = atLeast(difference, -1 / t);
      g = { value, dA: dx, dC: -dx, dp: dy, bound };
    } else if (tau > 0) {
      const mean = (logSum, power) => {
        const term = logMinus(power * hardest + logSum - Math.log(M), Math.log(tau) + power * p);
        return atLeast(term, Math.log1p(-tau) - power / t);
      };
      const above = mean(A, 1 + beta);
      const below = mean(C, beta);
      const value = above.value - below.value;
      const most = Math.min(1 / t, Math.max(-1 / t, value));
      const open = most === value ? 1 : 0; // else a clamp on the quotient decides
      const tilt = detach ? 0 : beta;
      const dp = (1 + tilt) * above.dy - tilt * below.dy;
      const bound = above.bound || below.bound || !open;
      g = { value: most, dA: open * above.dx, dC: -open * below.dx, dp: open * dp, bound };
    }
    const logNg = Math.log(M) + g.value;
    const x = logNg - p;
    const loss = Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
    const share = x > 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)); // dloss / dx
    // (1 + beta) pi - beta q, in an order that keeps the 1 for any beta
    const tilted = (j) => (detach ? 0 : beta * (g.dA * pi[j] + g.dC * q[j]));
    const ds = s.map((_, j) => share * (g.dA * pi[j] + tilted(j)));
    return { q, logNg, loss, clamped: g.bound, dp: share * (g.dp - 1), ds };
  }

  const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);
  const scaled = (a, c) => a.map((x) => c * x);

  function unit(v) {
    const length = Math.hypot(...v);
    return length > 0 ? scaled(v, 1 / length) : scaled(v, 0);
  }

  /* What the loss of one anchor does to vectors of any length: as anchor(), with the cosines, and
  the force, minus the gradient, on the anchor, on the positive and on each negative. */
  function forces(z, positive, negatives, options) {
    const others = [positive, ...negatives];
    const [a, ...u] = [z, ...others].map(unit);
    const t = options.temperature;
    const cosines = u.map((v) => dot(a, v));
    const found = anchor(cosines[0] / t, cosines.slice(1).map((c) => c / t), options);
    const slopes = [found.dp, ...found.ds].map((d) => d / t); // of the loss, in the cosines
    // only what is at right angles to a vector turns it
    const across = (own, length, towards, slope) => {
      if (!(length > 0)) return scaled(own, 0);
      const along = dot(own, towards);
      return towards.map((x, k) => (-slope * (x - along * own[k])) / length);
    };
    const onOthers = u.map((own, j) => across(own, Math.hypot(...others[j]), a, slopes[j]));
    const pull = a.map((_, k) => u.reduce((sum, own, j) => sum + slopes[j] * own[k], 0));
    const onAnchor = across(a, Math.hypot(...z), pull, 1);
    return { ...found, cosines, onAnchor, onPositive: onOthers[0], onNegatives: onOthers.slice(1) };
  }

  global.hclWeights = { lse, logMinus, anchor, forces };
})(typeof window === "undefined" ? globalThis : window);
