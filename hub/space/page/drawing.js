// The pad to draw on: by pointer or by keyboard, kept as strokes, so that a digit can be drawn again at another size.

import {resize} from './picture.js';

const SIZE = 320; // of the canvas, in its own pixels
const PEN = 24;
const STEP = 12; // of an arrow key

// scikit-learn's digits: a box of 32 x 32 dots, counted in blocks of 4 x 4, so 8 x 8 cells of 0 to 16; then 32 pixels.
// Their digits are as high as the box and up to three quarters as wide.
const DIGITS = {cells: 8, dots: 16, size: 32, pen: 0.18, width: 0.8, growth: 3};

/** A canvas to draw on. Calls `onStroke` when a stroke has ended, `onClear` when nothing is left. */
export class Pad {
  constructor(canvas, {onStroke, onClear}) {
    Object.assign(this, {canvas, onStroke, onClear, strokes: [], current: null, cursor: [SIZE / 2, SIZE / 2]});
    canvas.width = canvas.height = SIZE;
    this.context = canvas.getContext('2d', {willReadFrequently: true});
    canvas.addEventListener('pointerdown', (event) => this.begin(event));
    canvas.addEventListener('pointermove', (event) => this.current && this.extend(event));
    for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => this.end());
    canvas.addEventListener('keydown', (event) => this.press(event));
    for (const name of ['focus', 'blur']) canvas.addEventListener(name, () => this.paint());
    this.paint();
  }

  get isEmpty() {
    return this.strokes.length === 0;
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * SIZE, ((event.clientY - box.top) / box.height) * SIZE];
  }

  begin(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.isByKey = false;
    this.current = [this.place(event)];
    this.strokes.push(this.current);
    this.paint();
  }

  /** A slow device reports several moves in one event: all of them, or a stroke loses its corners. */
  extend(event) {
    const moves = event.getCoalescedEvents?.() ?? [];
    this.current.push(...(moves.length ? moves : [event]).map((move) => this.place(move)));
    this.cursor = this.current.at(-1);
    this.paint();
  }

  end() {
    if (!this.current) return;
    this.current = null;
    this.paint();
    this.onStroke();
  }

  /** Arrows move the pen, space puts it down and lifts it. */
  press(event) {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const move = moves[event.key];
    if (event.key === ' ') {
      if (this.current) this.end();
      else this.strokes.push((this.current = [[...this.cursor]]));
    } else if (move) {
      this.cursor = this.cursor.map((value, axis) => Math.min(Math.max(value + STEP * move[axis], 0), SIZE));
      this.current?.push(this.cursor);
    } else if (event.key === 'Backspace') {
      this.undo();
    } else if (event.key === 'Delete') {
      this.clear();
    } else return;
    event.preventDefault();
    this.isByKey = true;
    this.paint();
  }

  undo() {
    this.current = null;
    this.strokes.pop();
    this.paint();
    if (this.isEmpty) this.onClear();
    else this.onStroke();
  }

  clear() {
    Object.assign(this, {strokes: [], current: null, cursor: [SIZE / 2, SIZE / 2]});
    this.paint();
    this.onClear();
  }

  paint() {
    const {context} = this;
    context.fillStyle = '#000';
    context.fillRect(0, 0, SIZE, SIZE);
    drawStrokes(context, this.strokes, PEN);
    if (this.isByKey && document.activeElement === this.canvas) {
      context.fillStyle = this.current ? '#3ddc97' : '#8b8bff';
      context.beginPath();
      context.arc(...this.cursor, PEN / 2.5, 0, 2 * Math.PI);
      context.fill();
    }
  }

  /** The picture as it is drawn, {width, height, data} in RGBA. */
  toPicture() {
    const canvas = new OffscreenCanvas(SIZE, SIZE), context = canvas.getContext('2d');
    context.fillRect(0, 0, SIZE, SIZE);
    drawStrokes(context, this.strokes, PEN);
    return context.getImageData(0, 0, SIZE, SIZE);
  }

  /** The picture as scikit-learn's digits are made: fitted into the box, 8 x 8 cells of 0 to 16, then 32 pixels. */
  toDigit() {
    const {cells, dots, size, pen, width, growth} = DIGITS;
    const box = [0, 1].map((axis) => {
      const values = this.strokes.flat().map((point) => point[axis]);
      return {low: Math.min(...values), high: Math.max(...values)};
    });
    const extents = box.map(({low, high}) => Math.max(high - low, 1)), room = SIZE * (1 - pen);
    const scale = Math.min(room / extents[1], growth), widest = SIZE * (width - pen);
    const scales = [Math.min(scale, widest / extents[0]), scale];
    const move = (value, axis) => (value - (box[axis].low + box[axis].high) / 2) * scales[axis] + SIZE / 2;
    const moved = this.strokes.map((stroke) => stroke.map((point) => point.map(move)));
    const canvas = new OffscreenCanvas(SIZE, SIZE), context = canvas.getContext('2d');
    context.fillRect(0, 0, SIZE, SIZE);
    drawStrokes(context, moved, SIZE * pen);
    const {data} = context.getImageData(0, 0, SIZE, SIZE);
    const grey = new Uint8ClampedArray(SIZE * SIZE).map((_, i) => data[4 * i]);
    const small = resize({width: SIZE, height: SIZE, channels: 1, data: grey}, cells, cells, 'box');
    small.data = small.data.map((value) => Math.round(Math.round((value / 255) * dots) * (255 / dots)));
    const large = resize(small, size, size, 'bicubic');
    const rgba = new Uint8ClampedArray(4 * size * size).map((_, i) => (i % 4 === 3 ? 255 : large.data[i >> 2]));
    return {width: size, height: size, data: rgba};
  }
}

function drawStrokes(context, strokes, width) {
  Object.assign(context, {lineWidth: width, lineCap: 'round', lineJoin: 'round', strokeStyle: '#fff'});
  for (const [first, ...rest] of strokes) {
    context.beginPath();
    context.moveTo(...first);
    if (rest.length === 0) context.lineTo(...first);
    for (const point of rest) context.lineTo(...point);
    context.stroke();
  }
}
