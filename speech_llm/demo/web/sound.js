// Sound in: from the microphone or a file, as WAV where the server could not read it otherwise.
// Everything is decoded and encoded by the browser, so nothing has to be installed beside the server.

// What the server reads by itself; the very file is sent, and the answer is what `speech-llm chat` gives to it.
const READ_THERE = /\.(wav|flac|mp3|ogg|oga|opus|aiff?|au)$/i;
const WORKLET = `registerProcessor('collector', class extends AudioWorkletProcessor {
  process(inputs) {
    const channels = inputs[0];
    if (channels.length) {
      const mono = new Float32Array(channels[0].length);
      for (const channel of channels) for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / channels.length;
      this.port.postMessage(mono, [mono.buffer]);
    }
    return true;
  }
});`;

// A 16-bit mono WAV file.
function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (place, letters) => [...letters].forEach((letter, i) => view.setUint8(place + i, letter.charCodeAt(0)));
  text(0, 'RIFF');
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, 'WAVEfmt ');
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, 'data');
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new Blob([view.buffer], { type: 'audio/wav' });
}

// Mono samples of anything that the browser can decode, at `rate` where it is given, else at the browser's own.
async function decode(buffer, rate) {
  const context = rate ? new OfflineAudioContext(1, 1, rate) : new AudioContext();
  try {
    const decoded = await context.decodeAudioData(buffer);
    const mono = new Float32Array(decoded.length);
    for (let c = 0; c < decoded.numberOfChannels; c++) {
      const channel = decoded.getChannelData(c);
      for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / decoded.numberOfChannels;
    }
    return { samples: mono, rate: decoded.sampleRate };
  } finally {
    if (context.close) context.close();
  }
}

// A recording under way: `stop` ends it and gives its samples; `onLevel(level, seconds)` is told how loud it is.
async function startRecording(onLevel, onEnded) {
  if (!navigator.mediaDevices || !navigator.mediaDevices.getUserMedia) {
    throw new Error('This browser gives a page the microphone only on http://127.0.0.1 or over https; open the page there.');
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true },
    });
  } catch (error) {
    if (error.name === 'NotAllowedError') throw new Error('The microphone was not allowed; allow it in the address bar, or choose a file.');
    if (error.name === 'NotFoundError') throw new Error('There is no microphone here; plug one in, or choose a file.');
    throw new Error(`The microphone cannot be used (${error.message}); close what else uses it, or choose a file.`);
  }
  const context = new AudioContext();
  const address = URL.createObjectURL(new Blob([WORKLET], { type: 'text/javascript' }));
  try {
    await context.audioWorklet.addModule(address);
  } finally {
    URL.revokeObjectURL(address);
  }
  await context.resume();
  const collector = new AudioWorkletNode(context, 'collector', { numberOfOutputs: 0 });
  const blocks = [];
  let count = 0, peak = 0, since = 0;
  collector.port.onmessage = ({ data }) => {
    blocks.push(data);
    count += data.length;
    since += data.length;
    for (const sample of data) peak = Math.max(peak, Math.abs(sample));
    if (since > context.sampleRate / 25) {
      onLevel(Math.min(1, Math.sqrt(peak)), count / context.sampleRate);
      peak = since = 0;
    }
  };
  context.createMediaStreamSource(stream).connect(collector);
  stream.getTracks().forEach((track) => track.addEventListener('ended', onEnded));
  return {
    async stop() {
      collector.port.onmessage = null; // what is still on its way would say that it is going on
      stream.getTracks().forEach((track) => track.stop());
      collector.disconnect();
      const rate = context.sampleRate;
      await context.close();
      const samples = new Float32Array(count);
      let place = 0;
      for (const block of blocks) {
        samples.set(block, place);
        place += block.length;
      }
      return { samples, rate };
    },
  };
}

// Send a sound; gives its clip. Throws an Error with a sentence.
async function sendSound(blob, name) {
  let reply;
  try {
    reply = await fetch('/clips', { method: 'POST', body: blob, headers: { 'X-File-Name': encodeURIComponent(name), 'Content-Type': 'application/octet-stream' } });
  } catch {
    throw new Error('The server cannot be reached; see whether it still runs in its terminal.');
  }
  const told = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(told.error), { tooLong: told.too_long });
  return told;
}

// Send a file as it is where the server can read it, else decoded here. Gives { clip, note }.
async function sendFile(file, limits) {
  if (!file.size) throw new Error(`${file.name}: the file is empty.`);
  let refused = null;
  if (READ_THERE.test(file.name) && file.size <= limits.bytes) {
    try {
      return { clip: await sendSound(file, file.name), note: '' };
    } catch (error) {
      if (!error.tooLong) throw error;
      refused = error;
    }
  }
  if (file.size > 16 * limits.bytes) throw new Error(`${file.name}: ${Math.round(file.size / 2 ** 20)} MB is too much; cut out a part of at most ${limits.seconds} s.`);
  let sound;
  try {
    sound = await decode(await file.arrayBuffer());
  } catch {
    throw refused || new Error(`${file.name}: this is not a sound that the browser can decode; convert it to WAV, FLAC or MP3.`);
  }
  return sendSamples(sound, file.name, limits);
}

// Send samples as WAV, of a long sound its beginning.
async function sendSamples({ samples, rate }, name, limits) {
  const most = Math.floor(limits.seconds * rate);
  const long = samples.length > most;
  const clip = await sendSound(wav(long ? samples.subarray(0, most) : samples, rate), name);
  return { clip, note: long ? `Only its first ${limits.seconds} s are taken: the model hears no more at once.` : '' };
}
