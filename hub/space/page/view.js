// What the page shows of a picture on its way: the answer, the road, and one row per exit.

import {softmax, top} from './policy.js';

const BARS = 3;

export const find = (id) => document.getElementById(id);

/** An element with attributes, text and children. */
export function make(tag, {text = null, ...attributes} = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== null) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function percent(share, digits = 0) {
  const value = 100 * share;
  // What is not all must not read as all, nor a little as nothing.
  if (share < 1 && value >= 99.95) return '>\u00a099.9\u00a0%';
  if (digits === 0 && share > 0 && value < 0.5) return '<\u00a01\u00a0%';
  return `${value.toFixed(digits === 0 && share < 1 && value >= 99.5 ? 1 : digits)}\u00a0%`;
}

export function formatMs(ms) {
  if (ms < 0.1) return '<\u00a00.1\u00a0ms';
  return `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)}\u00a0ms`;
}

export function formatMacs(macs) {
  const [scale, unit] = macs >= 1e9 ? [1e9, 'G'] : macs >= 1e6 ? [1e6, 'M'] : [1e3, 'k'];
  const value = macs / scale;
  return `${value.toFixed(value < 10 ? 1 : 0)}\u00a0${unit}MACs`;
}

const SCORES = {
  confidence: (score, limit) => `confidence ${score.toFixed(2)}, leaves from ${limit.toFixed(2)}`,
  margin: (score, limit) => `margin ${score.toFixed(2)}, leaves from ${limit.toFixed(2)}`,
  entropy: (score, limit) => `entropy ${score.toFixed(2)}, leaves up to ${limit.toFixed(2)}`,
  patience: (score, limit) => `agreed ${score} of ${limit} times in a row`,
};

const BADGES = {
  waiting: '',
  running: 'computing',
  passed: 'not sure enough',
  left: 'leaves here',
  behind: 'only to compare',
  skipped: 'not used',
  off: 'never computed',
};

/** The rows and the road of a network; `update` shows a state of affairs in them. */
export class ExitsView {
  constructor(manifest, classes) {
    Object.assign(this, {manifest, classes, main: manifest.exits.length - 1});
    this.rows = manifest.exits.map(({name}) => this.makeRow(name));
    find('exits').replaceChildren(...this.rows.map(({row}) => row));
    this.makeRoad();
  }

  makeRow(name) {
    const bars = Array.from({length: Math.min(BARS, this.manifest.num_classes)}, () => {
      const [label, fill, value] = [make('span', {class: 'label'}), make('i'), make('span', {class: 'value'})];
      return {label, fill, value, item: make('li', {}, label, make('span', {class: 'bar'}, fill), value)};
    });
    const parts = Object.fromEntries(['badge', 'work', 'ms'].map((part) => [part, make('span', {class: part})]));
    const [fill, mark, text] = [make('i'), make('b'), make('span')];
    const of = make('span', {class: 'of', text: '\u00a0of the work'}); // out of sight on a phone
    const work = make('span', {class: 'share'}, parts.work, of), title = make('span', {class: 'title', text: name});
    const head = make('div', {class: 'head'}, title, parts.badge, work, parts.ms);
    const list = make('ol', {class: 'bars', 'aria-label': 'Most likely classes'}, ...bars.map(({item}) => item));
    const score = make('p', {class: 'score'}, make('span', {class: 'gauge'}, fill, mark), text);
    const body = make('div', {class: 'body'}, make('div', {}, list, score));
    return {row: make('li', {class: 'exit'}, head, body), bars, score: {line: score, fill, mark, text}, ...parts};
  }

  /** Exits at their share of the work; evenly where they would lie on each other. */
  makeRoad() {
    const costs = this.manifest.exits.map(({macs}) => macs.fixed);
    const shares = costs.map((cost) => cost / Math.max(...costs));
    const isTight = shares.some((share, k) => k && share - shares[k - 1] < 0.08);
    this.places = isTight ? shares.map((_, k) => (k + 1) / shares.length) : shares;
    this.stops = this.manifest.exits.map(({name}, k) => {
      const text = k === this.main ? 'main' : name.match(/\d+$/)?.[0] ?? `${k}`;
      const stop = make('span', {class: 'stop'}, make('i'), make('span', {text}));
      stop.style.left = `${100 * this.places[k]}%`;
      return stop;
    });
    find('road').append(...this.stops);
  }

  label(idx) {
    return (this.classes?.[idx] ?? `class ${idx}`).split(',')[0].replaceAll('_', ' ');
  }

  /**
   * Show what is known.
   *
   * Takes {steps, exit} of `follow`, the milliseconds of each stage, the costs of leaving, the policy, whether a
   * picture is there at all, whether the next stage is being computed, and whether exits behind the answer are shown.
   */
  update({steps, exit, times, costs, policy, hasPicture, isRunning, isPast}) {
    for (const [idx, row] of this.rows.entries()) {
      const step = steps[idx];
      const state = this.describe(step, idx, {exit, hasPicture, isRunning, isPast, known: steps.length});
      row.row.dataset.state = this.stops[idx].dataset.state = state;
      row.badge.textContent = state === 'off' && step ? 'not needed' : BADGES[state];
      row.work.textContent = percent(costs[idx] / this.manifest.plain_macs);
      row.ms.textContent = ['passed', 'left', 'behind'].includes(state) ? formatMs(times[idx]) : '';
      if (step?.answer) this.fill(row, step, policy);
    }
    const reached = exit ?? steps.length - 1;
    const place = hasPicture && reached >= 0 ? 100 * this.places[reached] : 0;
    find('driven').style.width = find('rider').style.left = `${place}%`;
    find('road').dataset.left = exit === null ? '' : 'yes';
  }

  describe(step, idx, {exit, hasPicture, isRunning, isPast, known}) {
    if (step && exit !== null && idx > exit) return isPast && step.isUsed ? 'behind' : 'off';
    if (step) return step.isUsed ? (idx === exit ? 'left' : 'passed') : 'skipped';
    if (isRunning && idx === known) return 'running';
    return hasPicture && exit !== null ? 'off' : 'waiting';
  }

  fill({bars, score}, {idx, answer, score: value}, policy) {
    const shares = softmax(answer);
    for (const [place, each] of top(shares, bars.length).entries()) {
      bars[place].label.textContent = this.label(each);
      bars[place].value.textContent = percent(shares[each], 1);
      bars[place].fill.style.width = `${100 * shares[each]}%`;
    }
    const limit = policy.thresholds[idx] ?? null; // main has none
    score.line.hidden = limit === null;
    if (limit === null) return;
    const most = policy.criterion === 'patience' ? Math.max(limit, value, 1) : 1;
    score.fill.style.width = `${(100 * value) / most}%`;
    score.mark.style.left = `${(100 * limit) / most}%`;
    score.text.textContent = SCORES[policy.criterion](value, limit);
  }
}

/** One sentence on a policy: where an image leaves. */
export function describePolicy(policy, exits) {
  const phrases = {
    confidence: (limit) => `from ${percent(limit)} confidence`,
    margin: (limit) => `from a margin of ${limit.toFixed(2)}`,
    entropy: (limit) => `up to an entropy of ${limit.toFixed(2)}`,
    patience: (limit) => `after agreeing ${limit} ${limit === 1 ? 'time' : 'times'} in a row`,
  };
  const phrase = phrases[policy.criterion], limits = policy.thresholds;
  const used = limits.flatMap((limit, k) => (limit === null ? [] : [`${exits[k].name} ${phrase(limit)}`]));
  const unused = limits.flatMap((limit, k) => (limit === null ? [exits[k].name] : []));
  const isSame = limits.length > 1 && limits.every((limit) => limit !== null && limit === limits[0]);
  const rule = isSame ? `every exit ${phrase(limits[0])}` : used.join(', ');
  const parts = [used.length ? `Leaves at ${rule}.` : 'No exit is used: main answers.'];
  if (used.length && unused.length) parts.push(`Not used: ${unused.join(', ')}.`);
  const mean = policy.combine === 'mean' ? 'mean' : 'geometric mean';
  if (policy.combine) parts.push(`The ${mean} of the exits so far answers.`);
  return parts.join(' ');
}
