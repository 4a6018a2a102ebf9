// Drawing: a sound's waveform and its spectrogram, computed here.
// In: samples. Out: pixels on a canvas, in the colours of the page.

const RAMPS = {
  light: [[255, 255, 255], [214, 230, 244], [122, 182, 226], [22, 104, 168], [13, 38, 66]],
  dark: [[20, 24, 29], [22, 52, 84], [28, 112, 178], [109, 179, 236], [255, 244, 214]],
};
const FFT = 512;
const FLOOR_DB = 75; // what is so far below the loudest is as good as silent

const isDark = () => matchMedia('(prefers-color-scheme: dark)').matches;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The canvas in device pixels, cleared.
function paper(canvas) {
  const box = canvas.getBoundingClientRect();
  const scale = Math.min(devicePixelRatio || 1, 2);
  canvas.width = Math.max(1, Math.round(box.width * scale));
  canvas.height = Math.max(1, Math.round(box.height * scale));
  const pen = canvas.getContext('2d');
  pen.clearRect(0, 0, canvas.width, canvas.height);
  return { pen, width: canvas.width, height: canvas.height, scale };
}

function drawWave(canvas, samples) {
  const { pen, width, height } = paper(canvas);
  let peak = 1e-4;
  for (const sample of samples) peak = Math.max(peak, Math.abs(sample));
  pen.fillStyle = css('--blue');
  for (let x = 0; x < width; x++) {
    let low = 0, high = 0;
    const end = Math.max(Math.floor(((x + 1) * samples.length) / width), Math.floor((x * samples.length) / width) + 1);
    for (let i = Math.floor((x * samples.length) / width); i < end; i++) {
      low = Math.min(low, samples[i] || 0);
      high = Math.max(high, samples[i] || 0);
    }
    const top = (0.5 - (0.46 * high) / peak) * height, bottom = (0.5 - (0.46 * low) / peak) * height;
    pen.fillRect(x, top, 1, Math.max(bottom - top, 1));
  }
}

// Levels (0 to 1) of a recording under way, the newest on the right.
function drawLevels(canvas, levels) {
  const { pen, width, height, scale } = paper(canvas);
  const step = 4 * scale;
  pen.fillStyle = '#d23f31';
  for (let i = 0; i * step < width && i < levels.length; i++) {
    const tall = Math.max(levels[levels.length - 1 - i] * 0.92 * height, 2 * scale);
    pen.fillRect(width - (i + 1) * step, (height - tall) / 2, step * 0.6, tall);
  }
}

// Power (dB) of `columns` windows over the sound, FFT / 2 bins each.
function powers(samples, columns) {
  const hann = Float32Array.from({ length: FFT }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FFT));
  const out = new Float32Array(columns * (FFT / 2));
  const re = new Float32Array(FFT), im = new Float32Array(FFT);
  for (let column = 0; column < columns; column++) {
    const start = Math.round(((column + 0.5) * samples.length) / columns - FFT / 2);
    for (let i = 0; i < FFT; i++) {
      re[i] = (samples[start + i] || 0) * hann[i];
      im[i] = 0;
    }
    fourier(re, im);
    for (let bin = 0; bin < FFT / 2; bin++) {
      out[column * (FFT / 2) + bin] = 10 * Math.log10(re[bin] * re[bin] + im[bin] * im[bin] + 1e-12);
    }
  }
  return out;
}

// In place, radix 2.
function fourier(re, im) {
  for (let i = 1, j = 0; i < FFT; i++) {
    let bit = FFT >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let size = 2; size <= FFT; size <<= 1) {
    const half = size >> 1, angle = (-2 * Math.PI) / size;
    for (let k = 0; k < half; k++) {
      const wr = Math.cos(angle * k), wi = Math.sin(angle * k);
      for (let i = k; i < FFT; i += size) {
        const j = i + half;
        const r = re[j] * wr - im[j] * wi, m = re[j] * wi + im[j] * wr;
        re[j] = re[i] - r;
        im[j] = im[i] - m;
        re[i] += r;
        im[i] += m;
      }
    }
  }
}

// Hertz to mel (Slaney's, as the encoder's filters): a picture of what it is given.
const mel = (hz) => (hz < 1000 ? (3 * hz) / 200 : 15 + (27 * Math.log(hz / 1000)) / Math.log(6.4));
const hertz = (m) => (m < 15 ? (200 * m) / 3 : 1000 * Math.exp(((m - 15) * Math.log(6.4)) / 27));

function drawSpectrogram(canvas, samples, rate) {
  const { pen, width, height, scale } = paper(canvas);
  const columns = Math.min(width, 900);
  const found = powers(samples, columns);
  let loudest = -120;
  for (const power of found) loudest = Math.max(loudest, power);
  const ramp = RAMPS[isDark() ? 'dark' : 'light'];
  const image = new ImageData(columns, height);
  const top = mel(rate / 2);
  for (let y = 0; y < height; y++) {
    const bin = (hertz((1 - y / (height - 1)) * top) / (rate / 2)) * (FFT / 2 - 1);
    const below = Math.min(Math.floor(bin), FFT / 2 - 2), part = Math.min(bin - below, 1);
    for (let x = 0; x < columns; x++) {
      const row = x * (FFT / 2) + below;
      const power = found[row] * (1 - part) + found[row + 1] * part;
      const place = Math.max(0, Math.min(1, 1 + (power - loudest) / FLOOR_DB)) ** 1.4 * (ramp.length - 1);
      const low = Math.min(Math.floor(place), ramp.length - 2), share = place - low;
      for (let c = 0; c < 3; c++) {
        image.data[4 * (y * columns + x) + c] = ramp[low][c] * (1 - share) + ramp[low + 1][c] * share;
      }
      image.data[4 * (y * columns + x) + 3] = 255;
    }
  }
  const aside = document.createElement('canvas');
  aside.width = columns;
  aside.height = height;
  aside.getContext('2d').putImageData(image, 0, 0);
  pen.drawImage(aside, 0, 0, columns, height, 0, 0, width, height);
  pen.font = `600 ${11 * scale}px system-ui, sans-serif`;
  pen.fillStyle = css('--ink');
  pen.strokeStyle = css('--paper');
  pen.lineWidth = 3 * scale;
  pen.lineJoin = 'round';
  pen.textBaseline = 'middle';
  for (const hz of [500, 1000, 2000, 4000]) {
    const y = (1 - mel(hz) / top) * height;
    pen.fillRect(0, y, 4 * scale, scale);
    pen.strokeText(hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`, 7 * scale, y);
    pen.fillText(hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`, 7 * scale, y);
  }
}
