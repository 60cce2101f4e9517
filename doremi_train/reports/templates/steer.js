// Steering a mixture by a saturating law: what methods/steering.py does, step by step, so that both
// agree. Less is better of every metric here. K domains, T targets.
"use strict";

const ASKED = 1e4, HELD = 1e7, NEAREST = 1e-3, ROOM = 1e-12, INSIDE = 0.05;
const STEPS = 100, CLOSE = 1e-9, TIGHT = 1e-12, SHRINK = 0.1, BARRIER = 1e-13, BACK = 0.995;

const sum = (values) => values.reduce((total, value) => total + value, 0);
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const dot = (a, b) => a.reduce((total, value, k) => total + value * b[k], 0);

// log(L − φ) of metric m at w: its value, slopes and second derivatives.
function curve(law, m, w) {
  const [r, p, knee] = [law.rate[m], law.power[m], law.knee[m]];
  let value = law.constant[m];
  const slope = [], bend = [];
  w.forEach((weight, k) => {
    const [passes, a, h] = [law.passes[k], law.help[m][k], law.harm[m][k]];
    const exposure = weight * passes, x = Math.max(r * exposure, 1e-30), raised = x ** p;
    const fade = Math.exp(-raised) * p * raised / x * r;
    const u = Math.log1p(exposure) - knee, after = 1 + exposure;
    const soft = Math.max(u, 0) + Math.log1p(Math.exp(-Math.abs(u)));
    const sharp = 1 / (1 + Math.exp(-u));
    value += a * Math.expm1(-raised) + h * soft * soft;
    slope.push((2 * h * soft * sharp / after - a * fade) * passes);
    bend.push((2 * h * sharp * sharp * (1 - soft) / (after * after)
      - a * fade * ((p - 1) / x - p * raised / x) * r) * passes * passes);
  });
  return { value, slope, bend };
}

// L of every metric.
function losses(law, w) {
  return law.floor.map((floor, m) => floor + Math.exp(Math.min(curve(law, m, w).value, 50)));
}

// x with A x = b, A symmetric and positive definite: Gauss with the largest pivot.
function solved(matrix, right) {
  const rows = matrix.map((row, i) => [...row, right[i]]), size = rows.length;
  for (let i = 0; i < size; i++) {
    let best = i;
    for (let j = i + 1; j < size; j++) {
      if (Math.abs(rows[j][i]) > Math.abs(rows[best][i])) best = j;
    }
    [rows[i], rows[best]] = [rows[best], rows[i]];
    for (let j = i + 1; j < size; j++) {
      const factor = rows[j][i] / rows[i][i];
      for (let k = i; k <= size; k++) rows[j][k] -= factor * rows[i][k];
    }
  }
  const x = new Array(size).fill(0);
  for (let i = size - 1; i >= 0; i--) {
    x[i] = (rows[i][size] - sum(x.map((value, k) => (k > i ? rows[i][k] * value : 0)))) / rows[i][i];
  }
  return x;
}

// What is to become of each metric: `better` is by how much, `held` whether it may not get worse by
// more than `tolerance`, a part of its size.
function wish(now, better, held, tolerance) {
  return {
    target: now.map((value, m) => better[m] > 0 ? value - better[m]
      : held[m] ? value + tolerance * Math.abs(value) : Infinity),
    price: better.map((amount) => (amount > 0 ? ASKED : HELD)),
  };
}

// The mixture within low and high that grants the wish, and is nearest to `start`.
function steer(law, start, wanted, low, top) {
  const metrics = wanted.target.flatMap((target, m) => (target < Infinity ? [m] : []));
  const at = (w) => metrics.map((m) => curve(law, m, w));
  const price = metrics.map((m) => wanted.price[m]);
  const first = at(start), limit = first.map(({ value }, t) => Math.log(Math.max(
    wanted.target[metrics[t]] - law.floor[metrics[t]], NEAREST * Math.exp(value))));
  const granted = first.every(({ value }, t) => value <= limit[t] + CLOSE);
  if (granted && start.every((value, k) => value >= low[k] - 1e-12 && value <= top[k] + 1e-12)) {
    return start;
  }
  const high = top.map((value, k) => Math.max(value, low[k] + ROOM));
  const ones = start.map(() => 1);

  let w = start.map((value, k) => {
    const margin = INSIDE * (high[k] - low[k]);
    return Math.min(Math.max(value, low[k] + margin), high[k] - margin);
  });
  const over = at(w).map(({ value }, t) => value - limit[t]);
  // What must stay above 0: distances from the walls and their multipliers, slacks and multipliers
  // of the targets. They are kept beside w: near a wall the difference has no digits.
  let now = {
    below: w.map((value, k) => value - low[k]), above: w.map((value, k) => high[k] - value),
    lower: ones.map(() => 0.1), upper: ones.map(() => 0.1),
    kept: over.map((value) => Math.max(-value, 0.01)),
    lacking: over.map((value) => Math.max(value, 0.01)),
    worth: limit.map(() => 1), left: price.map((value) => value - 1),
  };
  let level = 0;
  for (let step = 0; step < STEPS; step++) {
    const { below, above, lower, upper, kept, lacking, worth, left } = now;
    const curves = at(w), total = sum(w) - 1;
    const beyond = curves.map(({ value }, t) => value - limit[t]);
    const pairs = [
      ...lower.map((value, k) => value * below[k]), ...upper.map((value, k) => value * above[k]),
      ...worth.map((value, t) => value * kept[t]), ...left.map((value, t) => value * lacking[t]),
    ];
    const pull = w.map((value, k) =>
      value - start[k] + sum(curves.map(({ slope }, t) => worth[t] * slope[k])) + level);
    const wrong = largest(pull.map((value, k) => value - lower[k] + upper[k])) / (1 + largest(worth));
    const short = largest(beyond.map((value, t) => value + kept[t] - lacking[t]));
    if (Math.max(wrong, short, Math.abs(total)) < CLOSE && largest(pairs) < TIGHT) break;
    const barrier = Math.max(SHRINK * sum(pairs) / pairs.length, BARRIER);

    // Newton's step; all but the multipliers of targets and sum is eliminated.
    const stiff = w.map((_, k) => 1 + lower[k] / below[k] + upper[k] / above[k]
      + Math.max(sum(curves.map(({ bend }, t) => worth[t] * bend[k])), 0));
    const drawn = pull.map((value, k) => value + barrier / above[k] - barrier / below[k]);
    const rows = [...curves.map(({ slope }) => slope), ones];
    const scaled = rows.map((row) => row.map((value, k) => value / stiff[k]));
    const matrix = scaled.map((row, i) => rows.map((other, j) =>
      dot(row, other) + (i === j && i < worth.length ? kept[i] / worth[i] + lacking[i] / left[i] : 0)));
    const right = scaled.map((row, t) => (t < worth.length
      ? beyond[t] + barrier / worth[t] - barrier / left[t] : total) - dot(row, drawn));
    const found = solved(matrix, right), dWorth = found.slice(0, -1);
    const dW = drawn.map((value, k) => -(value + sum(rows.map((row, t) => row[k] * found[t]))) / stiff[k]);
    const moves = {
      below: dW, above: dW.map((value) => -value),
      lower: lower.map((value, k) => (barrier - value * dW[k]) / below[k] - value),
      upper: upper.map((value, k) => (barrier + value * dW[k]) / above[k] - value),
      kept: kept.map((value, t) => (barrier - value * dWorth[t]) / worth[t] - value),
      lacking: lacking.map((value, t) => (barrier + value * dWorth[t]) / left[t] - value),
      worth: dWorth, left: dWorth.map((value) => -value),
    };
    let shrink = 1e-300;
    for (const name in now) {
      moves[name].forEach((move, i) => { shrink = Math.max(shrink, -move / now[name][i]); });
    }
    const part = Math.min(1, BACK / shrink), old = now;
    now = {};
    for (const name in moves) now[name] = old[name].map((value, i) => value + part * moves[name][i]);
    w = w.map((value, k) => value + part * dW[k]);
    level += part * found[worth.length];
  }
  return w.map((value, k) => Math.min(Math.max(value, low[k]), top[k]));
}

// The best of one metric, whatever becomes of the others.
function best(law, start, metric, low, high) {
  const target = law.floor.map((_, m) => (m === metric ? -Infinity : Infinity));
  return steer(law, start, { target, price: law.floor.map(() => ASKED) }, low, high);
}

// Mixtures of the front of two metrics: the least of the first while the second keeps a value, from
// the best of the first to, ever more densely, the best of the second.
function front(law, start, first, second, low, high, count) {
  const ends = [first, second].map((m) => losses(law, best(law, start, m, low, high))[second]);
  return Array.from({ length: count }, (_, step) => {
    const target = law.floor.map(() => Infinity), price = law.floor.map(() => HELD);
    target[second] = ends[1] + (ends[0] - ends[1]) * (1 - step / (count - 1)) ** 3;
    target[first] = -Infinity;
    price[first] = ASKED;
    return steer(law, start, { target, price }, low, high);
  });
}
