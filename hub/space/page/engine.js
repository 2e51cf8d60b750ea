// The page's side of the worker.

/** A network in a worker. `load` it, then `begin` with a picture, which gives a `Journey`. */
export class Engine {
  constructor({onProgress = () => {}, onLoaded = () => {}} = {}) {
    this.waiting = new Map();
    this.count = 0;
    this.worker = new Worker(new URL('./worker.js', import.meta.url), {type: 'module'});
    this.worker.onmessage = ({data}) => {
      if (data.event === 'progress') return onProgress(data.idx, data.share);
      if (data.event === 'loaded') return onLoaded(data.idx, data.ms);
      const {resolve, reject} = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      return data.error ? reject(new Error(data.error)) : resolve(data.result);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      const error = new Error(`The network could not be started: ${event.message ?? 'a file is missing'}.`);
      for (const {reject} of this.waiting.values()) reject(error);
      this.waiting.clear();
    };
  }

  ask(action, values, transfer = []) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, {resolve, reject});
      this.worker.postMessage({id, action, ...values}, transfer);
    });
  }

  /** Load the stages of a manifest; resolves to the milliseconds of each once all are there. */
  load(manifest, precision) {
    const paths = manifest.programs[precision].stages;
    const files = paths.map((path) => ({url: `model/${path}`, ...manifest.files[path]}));
    this.preprocessing = manifest.preprocessing;
    return this.ask('load', {files, input_size: manifest.preprocessing.input_size});
  }

  /** Begin with {bitmap}, {picture} or {tensor}; what was on its way is given up. */
  async begin(input) {
    const number = ++this.count;
    const transfer = input.bitmap ? [input.bitmap] : [];
    const {seen, tensor} = await this.ask('begin', {number, preprocessing: this.preprocessing, ...input}, transfer);
    return new Journey(this, number, seen, tensor);
  }
}

/** A picture on its way through the network: what is known so far, and the next step. */
export class Journey {
  constructor(engine, number, seen, tensor) {
    Object.assign(this, {engine, number, seen, tensor, logits: [], times: [], isOver: false, pending: null});
  }

  /** Run one stage more; false if another picture has begun. The state is kept, so nothing is computed twice. */
  advance() {
    this.pending ??= this.step().finally(() => (this.pending = null));
    return this.pending;
  }

  async step() {
    const found = this.isOver ? null : await this.engine.ask('step', {number: this.number});
    if (found === null) this.isOver = true;
    else {
      this.logits.push(found.logits);
      this.times.push(found.ms);
    }
    return !this.isOver;
  }
}
