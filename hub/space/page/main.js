// The page: where pictures come from, what the slider sets, and the way of a picture through the network.

import {Pad} from './drawing.js';
import {Engine} from './engine.js';
import {decode} from './picture.js';
import {follow, leavingCosts, softmax, top} from './policy.js';
import {ExitsView, describePolicy, find, formatMacs, formatMs, make, percent} from './view.js';

const PACE = 170; // ms between two exits on the screen, for the eye; times shown are the network's own
const SILENCE = 400; // ms without a change before an answer is announced

const isCalm = matchMedia('(prefers-reduced-motion: reduce)');
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const samePolicy = (a, b) => JSON.stringify(a) === JSON.stringify(b);

class Demo {
  constructor(manifest, page) {
    Object.assign(this, {manifest, page, journey: null, turn: 0, truth: null, stageMs: null, progress: []});
    this.numStages = manifest.exits.length;
    this.view = new ExitsView(manifest, manifest.classes);
    this.engine = new Engine({
      onProgress: (idx, share) => this.showLoading(idx, share),
      onLoaded: (idx) => idx === 0 && this.becomeReady(),
    });
    this.setUpRules();
    this.setUpPictures();
    find('past').addEventListener('change', () => this.travel());
    find('model').textContent = page.title;
    document.title = `${page.title}: early exit in the browser`;
    find('lead').textContent =
      `${page.title} can answer at ${this.numStages} places. It runs on this device, and your picture never leaves it.`;
    find('made').textContent =
      `ONNX Runtime Web ${page.onnxruntime}, ${page.precision}, one thread of this device. Made with timm_multiexit.`;
    this.render();
  }

  async load() {
    this.stageMs = await this.engine.load(this.manifest, this.page.precision);
    this.render();
  }

  showLoading(idx, share) {
    if (document.body.dataset.state !== 'loading') return;
    find('where').textContent = `Loading ${this.manifest.exits[idx].name}, ${Math.round(100 * share)} %`;
  }

  becomeReady() {
    if (document.body.dataset.state === 'loading') document.body.dataset.state = 'ready';
    if (!this.journey) this.render();
    if (this.page.examples.length && !this.pad && !this.journey) this.takeExample(0);
  }

  // When to stop

  setUpRules() {
    const {policy, budgets} = this.manifest;
    const own = budgets.findIndex((each) => samePolicy(each.policy, policy));
    const kinds = {budget: budgets.length > 0, policy: policy !== null && own < 0, threshold: true};
    const names = {budget: 'Budget', policy: 'Its own', threshold: 'Threshold'};
    const possible = Object.keys(kinds).filter((kind) => kinds[kind]);
    for (const kind of possible) {
      const radio = make('input', {type: 'radio', name: 'rule', value: kind});
      radio.addEventListener('change', () => this.chooseRule(kind));
      find('rules').append(make('label', {}, radio, make('span', {text: names[kind]})));
    }
    find('rules').hidden = possible.length < 2;
    this.positions = {budget: own < 0 ? budgets.length >> 1 : own, threshold: 0.9};
    find('slider').addEventListener('input', () => {
      this.positions[this.rule] = Number(find('slider').value);
      this.applyRule();
      this.travel();
    });
    find('rules').querySelector('input').checked = true;
    this.chooseRule(possible[0]);
  }

  chooseRule(kind) {
    this.rule = kind;
    const slider = find('slider');
    find('slide').hidden = kind === 'policy';
    const [max, step] = kind === 'budget' ? [this.manifest.budgets.length - 1, 1] : [1, 0.01];
    Object.assign(slider, {min: 0, max, step, value: this.positions[kind] ?? 0});
    find('slider-label').textContent = kind === 'budget' ? 'Budget' : 'Confidence to leave with';
    this.applyRule();
    this.travel();
  }

  applyRule() {
    const {budgets, policy} = this.manifest, slider = find('slider');
    let text = '';
    if (this.rule === 'budget') {
      const {macs, policy: chosen} = budgets[this.positions.budget];
      this.policy = chosen;
      text = `${percent(macs / this.manifest.plain_macs)} of the work`;
    } else if (this.rule === 'threshold') {
      const thresholds = Array(this.numStages - 1).fill(this.positions.threshold);
      this.policy = {criterion: 'confidence', thresholds, temperatures: [], combine: null};
      text = `${Math.round(100 * this.positions.threshold)} %`;
    } else this.policy = policy;
    this.costs = leavingCosts(this.manifest.exits, this.policy);
    find('slider-value').textContent = text;
    slider.setAttribute('aria-valuetext', text);
    slider.style.setProperty('--share', (slider.value - slider.min) / (slider.max - slider.min || 1));
    const accuracy = this.rule === 'budget' ? budgets[this.positions.budget].accuracy : null;
    const right = accuracy === null ? '' : `, of which ${percent(accuracy / 100, 1)} get the right answer`;
    const found = this.rule === 'budget' ? ` The budget is an average over held-out pictures${right}.` : '';
    find('rule-note').textContent = describePolicy(this.policy, this.manifest.exits) + found;
  }

  // Pictures

  setUpPictures() {
    if (this.page.drawing !== 'none') {
      const onStroke = () => this.takeDrawing(), onClear = () => this.takeNothing();
      this.pad = new Pad(find('pad'), {onStroke, onClear});
      find('pad-hint').textContent = this.page.drawing === 'digits' ? 'Draw a digit' : 'Draw here';
      find('modes').hidden = false;
      find('undo').addEventListener('click', () => this.pad.undo());
      find('clear').addEventListener('click', () => this.pad.clear());
      for (const radio of document.getElementsByName('mode')) {
        radio.addEventListener('change', () => this.setMode(radio.value));
      }
    }
    this.setMode(this.pad ? 'draw' : 'photo');
    find('drop').dataset.crop = this.manifest.preprocessing.crop_mode ?? 'center';
    find('choose').addEventListener('click', () => find('file').click());
    find('file').addEventListener('change', ({target}) => {
      this.takeFile(target.files[0]);
      target.value = ''; // so that the same file can be chosen again
    });
    for (const name of ['dragenter', 'dragover', 'dragleave', 'drop']) {
      addEventListener(name, (event) => {
        event.preventDefault();
        find('stage').classList.toggle('is-over', name === 'dragenter' || name === 'dragover');
        if (name === 'drop') this.takeFile(event.dataTransfer.files[0]);
      });
    }
    addEventListener('paste', (event) => this.takeFile(event.clipboardData.files[0]));
    const buttons = this.page.examples.map(({file, label, name}, idx) => {
      const image = make('img', {src: file, alt: label === null ? name : this.view.label(label), loading: 'lazy'});
      const button = make('button', {type: 'button', 'aria-pressed': 'false'}, image);
      button.addEventListener('click', () => this.takeExample(idx));
      return make('li', {}, button);
    });
    find('examples').replaceChildren(...buttons);
  }

  setMode(mode) {
    find('stage').dataset.mode = document.body.dataset.mode = mode;
    for (const radio of document.getElementsByName('mode')) radio.checked = radio.value === mode;
  }

  mark(example) {
    for (const [idx, button] of find('examples').querySelectorAll('button').entries()) {
      button.setAttribute('aria-pressed', `${idx === example}`);
    }
  }

  takeDrawing() {
    this.mark(null);
    find('pad-hint').hidden = true;
    this.start({picture: this.page.drawing === 'digits' ? this.pad.toDigit() : this.pad.toPicture()});
  }

  takeNothing() {
    this.turn += 1;
    this.journey = null;
    find('pad-hint').hidden = false;
    find('seen').hidden = find('rider').hidden = true;
    this.render();
  }

  async takeExample(idx) {
    const {file, label, name} = this.page.examples[idx];
    document.body.dataset.state = 'busy';
    this.mark(idx);
    await this.takeFile(await (await fetch(file)).blob(), {truth: label, name, example: idx});
  }

  async takeFile(file, {truth = null, name = 'Your picture', example = null} = {}) {
    if (!file) return;
    const mine = (this.taken = (this.taken ?? 0) + 1), before = document.body.dataset.state;
    let bitmap = null;
    document.body.dataset.state = 'busy';
    try {
      bitmap = await decode(file);
    } catch {
      document.body.dataset.state = before;
      return showError('This file is not a picture that the browser can read. Choose a JPEG, PNG or WebP.');
    }
    if (mine !== this.taken) return;
    URL.revokeObjectURL(find('shown').src);
    Object.assign(find('shown'), {src: URL.createObjectURL(file), alt: name, hidden: false});
    find('shown').dataset.small = bitmap.width <= 64 ? 'yes' : '';
    find('invite').hidden = true;
    this.mark(example);
    this.setMode('photo');
    await this.start({bitmap}, truth);
  }

  // The way of a picture

  async start(input, truth = null) {
    const mine = ++this.turn;
    hideError();
    document.body.dataset.state = 'busy';
    try {
      const journey = await this.engine.begin(input);
      if (mine !== this.turn) return;
      Object.assign(this, {journey, truth});
      if (journey.seen) showSeen(journey.seen);
      await this.travel({isPaced: !isCalm.matches});
    } catch (error) {
      showError(error.message);
    }
  }

  /** Go on with the picture until the policy stops it; what was computed before is kept. */
  async travel({isPaced = false} = {}) {
    const mine = ++this.turn, {journey} = this;
    if (!journey) return this.render();
    try {
      for (;;) {
        const {exit} = follow(this.policy, journey.logits), isPast = find('past').checked;
        const isRunning = journey.logits.length < this.numStages && (exit === null || isPast);
        document.body.dataset.state = isRunning ? 'busy' : 'done';
        this.render(isRunning);
        if (!isRunning) break;
        if (!(await journey.advance()) || mine !== this.turn) return;
        if (isPaced && journey.logits.length > 1) await sleep(PACE);
        if (mine !== this.turn) return;
      }
      await sleep(SILENCE);
      if (mine === this.turn) find('status').textContent = this.summary;
    } catch (error) {
      showError(error.message);
    }
  }

  render(isRunning = false) {
    const {journey, policy, costs} = this, times = journey?.times ?? [];
    const found = follow(policy, journey?.logits ?? []);
    const isPast = find('past').checked;
    this.view.update({...found, times, costs, policy, hasPicture: journey !== null, isRunning, isPast});
    const known = found.steps.findLast((step) => step.answer && (found.exit === null || step.idx <= found.exit));
    find('answer').dataset.state = !known ? 'empty' : found.exit === null ? 'open' : 'closed';
    if (known) this.renderAnswer(known, found.exit, times);
    else this.renderEmpty();
  }

  renderAnswer({idx, answer}, exit, times) {
    const {manifest, costs, stageMs, truth} = this, shares = softmax(answer), [first, second] = top(shares, 2);
    const name = this.view.label(first), at = manifest.exits[idx].name, share = costs[idx] / manifest.plain_macs;
    const isMain = idx === this.numStages - 1;
    const spent = times.slice(0, idx + 1).reduce((a, b) => a + b, 0);
    const unspent = stageMs?.slice(idx + 1).reduce((a, b) => a + b, 0); // what the later stages take as a rule
    const saved = share <= 1 ? `${percent(1 - share)} saved` : `${percent(share - 1)} more than without exits`;
    const verdict = truth === null ? '' : truth === first ? 'correct' : `it is ${this.view.label(truth)}`;
    find('name').textContent = name;
    const left = isMain ? 'went all the way to main' : `left at ${at}`;
    find('where').textContent = exit === null ? `so far, at ${at}` : left;
    Object.assign(find('verdict'), {textContent: verdict, hidden: verdict === '' || exit === null});
    find('verdict').dataset.verdict = truth === first ? 'right' : 'wrong';
    setFact('work', percent(share), exit === null ? formatMacs(costs[idx]) : saved);
    setFact('time', formatMs(spent), exit !== null && unspent ? `about ${formatMs(unspent)} saved` : '');
    setFact('sure', percent(shares[first]), `then ${this.view.label(second)}, ${percent(shares[second])}`);
    this.summary =
      `${name}, ${percent(shares[first])} confident, at ${at}${verdict && `, ${verdict}`}. ` +
      `${percent(share)} of the network's work, ${saved}, in ${formatMs(spent)}.`;
  }

  renderEmpty() {
    const isLoading = document.body.dataset.state === 'loading', wants = this.page.drawing === 'digits' && this.pad;
    find('name').textContent = isLoading ? '…' : '?';
    if (!isLoading) find('where').textContent = wants ? 'draw a digit, or choose a picture' : 'choose a picture';
    find('verdict').hidden = true;
    for (const fact of ['work', 'time', 'sure']) setFact(fact, '–', '');
  }
}

function setFact(name, value, sub) {
  find(`fact-${name}`).textContent = value;
  find(`fact-${name}-sub`).textContent = sub;
}

function showSeen({width, height, data}) {
  for (const canvas of [find('seen').querySelector('canvas'), find('rider')]) {
    Object.assign(canvas, {width, height});
    canvas.getContext('2d').putImageData(new ImageData(data, width, height), 0, 0);
  }
  find('seen').hidden = find('rider').hidden = false;
}

function showError(message) {
  Object.assign(find('error'), {textContent: message, hidden: false});
}

function hideError() {
  find('error').hidden = true;
}

function setUpTheme() {
  const root = document.documentElement, button = find('theme');
  const prefersDark = matchMedia('(prefers-color-scheme: dark)');
  const show = (theme) => {
    root.dataset.theme = theme;
    button.setAttribute('aria-label', theme === 'dark' ? 'Use light colours' : 'Use dark colours');
  };
  let stored = null;
  try {
    stored = localStorage.getItem('theme');
  } catch {
    // A page inside another may not store; then the system decides each time.
  }
  show(stored ?? (prefersDark.matches ? 'dark' : 'light'));
  prefersDark.addEventListener('change', () => show(prefersDark.matches ? 'dark' : 'light'));
  button.addEventListener('click', () => {
    show(root.dataset.theme === 'dark' ? 'light' : 'dark');
    try {
      localStorage.setItem('theme', root.dataset.theme);
    } catch {
      // as above
    }
  });
}

async function readJson(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} could not be read: ${response.status} ${response.statusText}.`);
  return response.json();
}

setUpTheme();
try {
  const [manifest, page] = await Promise.all([readJson('model/manifest.json'), readJson('page.json')]);
  await new Demo(manifest, page).load();
  document.body.dataset.loaded = 'yes';
} catch (error) {
  showError(error.message);
  document.body.dataset.state = 'failed';
}
