// The network, off the page's thread: loads the stages one after another and runs them one step at a time.

import * as ort from './vendor/ort.wasm.min.mjs';
import {preprocess} from './picture.js';

const here = (name) => new URL(name, import.meta.url).href;
ort.env.wasm.wasmPaths = {
  mjs: here('vendor/ort-wasm-simd-threaded.mjs'),
  wasm: here('vendor/ort-wasm-simd-threaded.wasm'),
};
ort.env.wasm.numThreads = 1; // more need headers that a plain static host does not send
ort.env.logLevel = 'error';

// A stage is run so often or so long before it counts as warm: the browser compiles code better that it meets often.
const WARM_RUNS = 40;
const WARM_MS = 250;

let stages = []; // promises of {session, ms}, shallow to deep
let journey = null; // the picture on its way: {number, next, state}
let last = Promise.resolve();

/** Wait for what the runtime is doing: its calls share one stack, and must not overlap. */
function alone(action) {
  const done = last.then(action);
  last = done.catch(() => {});
  return done;
}

async function download({url, size, sha256}, onProgress) {
  const response = await fetch(here(url));
  if (!response.ok) throw new Error(`${url} could not be read: ${response.status} ${response.statusText}.`);
  const bytes = new Uint8Array(size), reader = response.body.getReader();
  let count = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (count + part.value.length <= size) bytes.set(part.value, count);
    count += part.value.length;
    onProgress(Math.min(count / size, 1));
  }
  // Digests exist on secure pages alone: https, or this machine.
  const digest = count === size && crypto.subtle ? await crypto.subtle.digest('SHA-256', bytes) : null;
  const hex = digest && Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, '0')).join('');
  if (count !== size || (hex && hex !== sha256)) {
    throw new Error(`${url} is not the file that the manifest describes. Make the page again.`);
  }
  return bytes;
}

function makeImage(values, size) {
  return new ort.Tensor('float32', values, [1, ...size]);
}

/** Run a stage on what the one before gave; `logits` are out, the rest is for the next stage, by the same names. */
async function runStage(session, state) {
  const begin = performance.now();
  const inputs = Object.fromEntries(session.inputNames.map((name) => [name, state[name]]));
  const {logits, ...next} = await session.run(inputs);
  return {logits: logits.data, state: next, ms: performance.now() - begin};
}

/** Load the stages in order; each is ready, warm and timed as soon as it is there. */
function load({files, input_size: size}) {
  let warm = Promise.resolve({image: makeImage(new Float32Array(size.reduce((a, b) => a * b)), size)});
  stages = files.map((file, idx) => {
    const inputs = warm;
    const stage = (async () => {
      const given = await inputs; // one after another, so that the shallow exits are there first
      const bytes = await download(file, (share) => postMessage({event: 'progress', idx, share}));
      const session = await alone(() => ort.InferenceSession.create(bytes, {executionProviders: ['wasm']}));
      const times = [], begin = performance.now();
      let state = null;
      while (times.length < 3 || (times.length < WARM_RUNS && performance.now() - begin < WARM_MS)) {
        const run = await alone(() => runStage(session, given));
        times.push(run.ms);
        state = run.state;
      }
      const ms = Math.min(...times); // without what else the device does meanwhile
      postMessage({event: 'loaded', idx, ms});
      return {session, ms, state};
    })();
    warm = stage.then(({state}) => state);
    warm.catch(() => {}); // said once, by the stage
    return stage;
  });
  return Promise.all(stages).then((all) => all.map(({ms}) => ms));
}

/** Begin with a picture: {bitmap}, {picture} in RGBA, or {tensor} that is preprocessed already. */
function begin({number, bitmap, picture, tensor, preprocessing}) {
  let seen = null;
  if (bitmap) {
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height), context = canvas.getContext('2d');
    context.fillStyle = '#fff';
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    picture = context.getImageData(0, 0, canvas.width, canvas.height);
  }
  if (picture) ({tensor, seen} = preprocess(picture, preprocessing));
  journey = {number, next: 0, state: {image: makeImage(tensor, preprocessing.input_size)}};
  return {seen, tensor};
}

/** Run the next stage of the picture; null if another picture has begun. */
async function step({number}) {
  const mine = journey;
  if (mine?.number !== number) return null;
  const {session} = await stages[mine.next];
  if (mine !== journey) return null;
  const {logits, state, ms} = await alone(() => runStage(session, mine.state));
  if (logits.some(Number.isNaN)) throw new Error('The network gives NaN for this picture.');
  mine.state = state;
  return {idx: mine.next++, logits: Float32Array.from(logits), ms};
}

const actions = {load, begin, step};

onmessage = async ({data: {id, action, ...values}}) => {
  try {
    postMessage({id, result: await actions[action](values)});
  } catch (error) {
    postMessage({id, error: error.message});
  }
};
