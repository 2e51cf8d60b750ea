// From a picture to what the network takes: timm's transform for evaluation, with Pillow's resampling, bit for bit.

/** Decode a file of pixels as Pillow reads it, by the numbers in it; photos of phones are turned upright. */
export function decode(blob) {
  return createImageBitmap(blob, {colorSpaceConversion: 'none', imageOrientation: 'from-image'});
}

const PRECISION = 22; // bits behind the point of Pillow's weights for 8-bit pictures

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

const FILTERS = {
  box: {support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)},
  bilinear: {support: 1, weight: (x) => Math.max(1 - Math.abs(x), 0)},
  hamming: {
    support: 1,
    weight: (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x))),
  },
  bicubic: {
    support: 2,
    weight: (signed) => {
      const a = -0.5, x = Math.abs(signed);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
  lanczos: {support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)},
};

/** For each place of the output: the first place of the input that it reads, and the weights from there. */
function makeWeights(before, after, filter) {
  const scale = before / after, widened = Math.max(scale, 1), support = filter.support * widened;
  return Array.from({length: after}, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), before);
    const weights = Array.from({length: end - first}, (_, i) => filter.weight((i + first - center + 0.5) / widened));
    const sum = weights.reduce((a, b) => a + b, 0);
    const scaled = weights.map((weight) => (sum ? weight / sum : weight) * 2 ** PRECISION);
    return {first, weights: scaled.map((weight) => Math.trunc(weight + (weight < 0 ? -0.5 : 0.5)))};
  });
}

/** Resample along one axis; the picture is [length, stride] with `stride` bytes from one place to the next. */
function resampleAxis({data, outer, length, inner}, after, filter) {
  const out = new Uint8ClampedArray(outer * after * inner), weights = makeWeights(length, after, filter);
  for (let o = 0; o < outer; o++) {
    for (let place = 0; place < after; place++) {
      const {first, weights: row} = weights[place];
      for (let i = 0; i < inner; i++) {
        let sum = 2 ** (PRECISION - 1), at = (o * length + first) * inner + i;
        for (const weight of row) {
          sum += data[at] * weight;
          at += inner;
        }
        out[(o * after + place) * inner + i] = sum >> PRECISION;
      }
    }
  }
  return out;
}

/** The places of the input that `nearest` takes. Pillow adds up the steps; halves fall as rounding lets them. */
function nearestPlaces(before, after) {
  const step = before / after, places = [];
  for (let at = step * 0.5; places.length < after; at += step) places.push(Math.trunc(at));
  return places;
}

/** Pillow's `resize` of {width, height, channels, data}. */
export function resize(picture, width, height, interpolation) {
  let {data} = picture;
  const {channels} = picture;
  if (interpolation === 'nearest') {
    const out = new Uint8ClampedArray(width * height * channels);
    const columns = nearestPlaces(picture.width, width), rows = nearestPlaces(picture.height, height);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = (rows[y] * picture.width + columns[x]) * channels;
        for (let c = 0; c < channels; c++) out[(y * width + x) * channels + c] = data[at + c];
      }
    }
    return {width, height, channels, data: out};
  }
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`interpolation must be nearest or one of ${Object.keys(FILTERS).join(', ')}`);
  if (width !== picture.width) {
    data = resampleAxis({data, outer: picture.height, length: picture.width, inner: channels}, width, filter);
  }
  if (height !== picture.height) {
    data = resampleAxis({data, outer: 1, length: picture.height, inner: width * channels}, height, filter);
  }
  return {width, height, channels, data};
}

/** Python's `round`: halves go to the even neighbour. */
function roundEven(value) {
  const below = Math.floor(value), rest = value - below;
  return rest === 0.5 ? below + (below % 2) : Math.round(value);
}

/** Crop from the center; where the picture is smaller it is padded with `fill`, one value per channel. */
function centerCrop(picture, width, height, fill) {
  const {channels} = picture, out = new Uint8ClampedArray(width * height * channels);
  // torchvision pads first, the smaller half before, then crops what is too large.
  const shift = (before, after) =>
    after > before ? -Math.floor((after - before) / 2) : roundEven((before - after) / 2);
  const left = shift(picture.width, width), above = shift(picture.height, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const fromX = x + left, fromY = y + above;
      const isInside = fromX >= 0 && fromX < picture.width && fromY >= 0 && fromY < picture.height;
      const at = (fromY * picture.width + fromX) * channels;
      for (let c = 0; c < channels; c++) {
        out[(y * width + x) * channels + c] = isInside ? picture.data[at + c] : fill[c];
      }
    }
  }
  return {width, height, channels, data: out};
}

/** The size that the whole picture is resized to before it is cropped, as timm and torchvision compute it. */
function scaledSize(picture, [height, width], {crop_mode: mode, crop_pct: share}) {
  const target = {height: Math.floor(height / share), width: Math.floor(width / share)};
  if (mode === 'squash') return target;
  const ratios = [picture.height / target.height, picture.width / target.width];
  if (mode !== 'border' && target.height === target.width) {
    const short = Math.min(picture.width, picture.height), long = Math.max(picture.width, picture.height);
    const other = Math.trunc((target.height * long) / short);
    return picture.width <= picture.height
      ? {width: target.width, height: other}
      : {width: other, height: target.height};
  }
  const ratio = mode === 'border' ? Math.max(...ratios) : Math.min(...ratios);
  return {width: roundEven(picture.width / ratio), height: roundEven(picture.height / ratio)};
}

/** RGBA, as a canvas gives it, to three channels, or to Pillow's grey. */
function takeChannels({width, height, data}, channels) {
  const out = new Uint8ClampedArray(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (channels === 1) out[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else out.set([r, g, b], 3 * i);
  }
  return {width, height, channels, data: out};
}

/**
 * What the network sees of a picture.
 *
 * Takes {width, height, data} in RGBA and the manifest's `preprocessing`; returns {tensor, seen}: [C, H, W] normalized
 * in single precision, and the pixels before that as {width, height, data} in RGBA, to show.
 */
export function preprocess(picture, options) {
  const [channels, height, width] = options.input_size;
  const {mean, std, interpolation} = options;
  const whole = takeChannels(picture, channels), size = scaledSize(whole, [height, width], options);
  const scaled = resize(whole, Math.max(size.width, 1), Math.max(size.height, 1), interpolation);
  const fill = mean.map((value) => (options.crop_mode === 'border' ? roundEven(255 * value) : 0));
  const {data} = centerCrop(scaled, width, height, fill);
  const tensor = new Float32Array(channels * height * width);
  const seen = {width, height, data: new Uint8ClampedArray(4 * height * width).fill(255)};
  for (let c = 0; c < channels; c++) {
    const [center, spread] = [Math.fround(mean[c]), Math.fround(std[c])];
    for (let i = 0; i < height * width; i++) {
      tensor[c * height * width + i] = Math.fround(Math.fround(data[i * channels + c] / 255) - center) / spread;
    }
  }
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) seen.data[4 * i + c] = data[i * channels + Math.min(c, channels - 1)];
  }
  return {tensor, seen};
}
