// Who leaves where: what timm_multiexit's policies/leaving.py does, for one image.
//
// In single precision like there, so that what is rounded to a threshold there is rounded to it here: a confidence of
// 1 - 1e-9 is 1, and leaves at a threshold of 1.

const round = Math.fround;

/** Log-probabilities of logits. */
function logSoftmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - largest);
  const log = Math.log(sum);
  return Float32Array.from(logits, (value) => value - largest - log);
}

/** Probabilities of logits. */
export function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const shares = Float32Array.from(logits, (value) => Math.exp(value - largest));
  const sum = round(shares.reduce((a, b) => a + b, 0));
  return shares.map((value) => value / sum);
}

/** Indices of the `count` largest values, largest first; of equals the first. */
export function top(values, count) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b).slice(0, count);
}

/** [score of probabilities, whether a sample leaves where it is at least the threshold]; patience counts exits. */
export const CRITERIA = {
  confidence: {score: (shares) => shares[top(shares, 1)[0]], leavesAtLeast: true},
  entropy: {
    score: (shares) => {
      let sum = 0;
      for (const share of shares) sum -= share > 0 ? share * Math.log(share) : 0;
      return Math.min(round(sum) / Math.log(shares.length), 1);
    },
    leavesAtLeast: false,
  },
  margin: {
    score: (shares) => {
      const [first, second] = top(shares, 2);
      return shares[first] - shares[second];
    },
    leavesAtLeast: true,
  },
  patience: {score: null, leavesAtLeast: true},
};

/** A policy at work on one image, exit by exit. */
export class PolicyRun {
  constructor(policy) {
    this.policy = policy;
    this.numSeen = 0;
    this.total = null;
    this.predicted = null;
    this.streak = 0;
  }

  /** Whether exit `idx` is run at all; main always is. */
  isUsed(idx) {
    return idx >= this.policy.thresholds.length || this.policy.thresholds[idx] !== null;
  }

  /** What the classifier answers: its own logits, tempered, or combined with those before it. In order, used alone. */
  answer(idx, logits) {
    const {temperatures, combine} = this.policy;
    let values = Float32Array.from(logits);
    if (temperatures.length) values = values.map((value) => value / round(temperatures[idx]));
    if (combine === null) return values;
    if (combine === 'geometric') values = logSoftmax(values);
    this.total = this.total === null ? values : this.total.map((value, i) => value + values[i]);
    this.numSeen += 1;
    return this.total.map((value) => value / this.numSeen);
  }

  /** The score of an answer; of patience how many exits in a row agreed with the one before. */
  score(answer) {
    const {score} = CRITERIA[this.policy.criterion];
    if (score !== null) return round(score(softmax(answer)));
    const predicted = top(answer, 1)[0];
    this.streak = this.predicted === predicted ? this.streak + 1 : 0;
    this.predicted = predicted;
    return this.streak;
  }

  /** Whether an image with this score leaves at exit `idx`, which must be used. */
  leaves(idx, score) {
    const threshold = round(this.policy.thresholds[idx]);
    return CRITERIA[this.policy.criterion].leavesAtLeast ? score >= threshold : score <= threshold;
  }
}

/**
 * Follow a policy through the logits that are known, shallow to deep.
 *
 * Returns {steps, exit}: for each known classifier {idx, isUsed, answer, score, leaves}, the first that leaves is the
 * exit, and later ones are what they would have answered; exit is null while no known classifier leaves.
 */
export function follow(policy, logits) {
  const run = new PolicyRun(policy), main = policy.thresholds.length, steps = [];
  let exit = null;
  for (const [idx, values] of logits.entries()) {
    if (!run.isUsed(idx)) {
      steps.push({idx, isUsed: false, answer: null, score: null, leaves: false});
      continue;
    }
    const answer = run.answer(idx, values), score = run.score(answer);
    const leaves = exit === null && (idx === main || run.leaves(idx, score));
    if (leaves) exit = idx;
    steps.push({idx, isUsed: true, answer, score, leaves});
  }
  return {steps, exit};
}

/** MACs of leaving at each classifier, main last: the path to it, its head, and the used heads on the way. */
export function leavingCosts(exits, policy) {
  // What all heads before an exit cost is `sequential - fixed`, so one head is the difference of two of those.
  const before = exits.map(({macs}) => macs.sequential - macs.fixed);
  let spent = 0;
  return exits.map(({macs}, idx) => {
    const cost = macs.fixed + spent;
    if (idx + 1 < exits.length && policy.thresholds[idx] !== null) spent += before[idx + 1] - before[idx];
    return cost;
  });
}
