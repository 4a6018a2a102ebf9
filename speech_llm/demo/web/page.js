// The page: which sound is chosen, what is asked of it, and what everything on it does.

const at = (id) => document.getElementById(id);
const page = { about: null, clip: null, samples: null, conversation: null, asking: null, recorder: null, turn: 0 };

const say = (text) => { at('status').textContent = text; };
// For those who do not see the page.
const announce = (text) => { at('aloud').textContent = text; };
function showError(id, error) {
  at(id).textContent = error ? error.message : '';
  at(id).hidden = !error;
}
const plural = (count, word) => `${count} ${word}${count === 1 ? '' : 's'}`;

// ---------------------------------------------------------------- the sound

// Let nothing but the newest choice be shown, however long each takes to arrive.
async function choose(getClip) {
  const turn = ++page.turn;
  dropRecording();
  showError('sound-error', null);
  try {
    say('Reading the sound ...');
    const { clip, note } = await getClip();
    const reply = await fetch(`/clips/${clip.id}`);
    if (!reply.ok) throw new Error((await reply.json()).error);
    const bytes = await reply.arrayBuffer();
    const blob = new Blob([bytes], { type: 'audio/wav' });
    const { samples, rate } = await decode(bytes, 16000);
    if (turn !== page.turn) return;
    Object.assign(page, { clip, samples, rate });
    showClip(blob);
    say(note);
    startConversation();
    describe(clip, turn);
  } catch (error) {
    if (turn !== page.turn) return;
    showError('sound-error', error);
    say('');
    if (!page.clip) at('stage').hidden = true;
  }
}

function showClip(blob) {
  const { clip } = page;
  at('no-sound').hidden = true;
  at('stage').hidden = false;
  at('clip-name').textContent = clip.name;
  const length = `${clip.duration_s.toFixed(1)} s`;
  at('clip-length').textContent = length;
  at('wave').setAttribute('aria-label', `Waveform of ${clip.name}, ${length}`);
  at('spectrogram').setAttribute('aria-label', `Mel spectrogram of ${clip.name}, ${length}, up to 8 kHz`);
  if (at('player').src) URL.revokeObjectURL(at('player').src);
  at('player').src = URL.createObjectURL(blob);
  for (const button of at('example-list').children) button.setAttribute('aria-pressed', String(button.dataset.id === clip.id));
  draw();
  tell();
}

function draw() {
  if (!page.samples || page.recorder) return;
  drawWave(at('wave'), page.samples);
  drawSpectrogram(at('spectrogram'), page.samples, page.rate);
  moveHead();
}

function moveHead() {
  const player = at('player');
  const head = at('playhead');
  head.hidden = !player.duration || (player.paused && !player.currentTime);
  head.style.left = `${(100 * player.currentTime) / (player.duration || 1)}%`;
  if (!player.paused) requestAnimationFrame(moveHead);
}

async function describe(clip, turn) {
  if (clip.description || !page.about.describes) return;
  at('told').hidden = false;
  at('description').textContent = 'Listening ...';
  try {
    await stream('/describe', { clip: clip.id }, undefined, (event) => {
      if (event.event === 'described') Object.assign(clip, event.clip);
    });
    if (turn === page.turn) tell();
  } catch (error) {
    if (turn === page.turn) at('description').textContent = error.message;
  }
}

function tell() {
  const { clip } = page;
  at('told').hidden = !clip.description;
  if (!clip.description) return;
  at('told-by').textContent = clip.example ? 'from the labels and describers of the run' : 'from the sound, by the describers';
  at('description').textContent = clip.description;
  at('attributes').replaceChildren();
  for (const [name, value] of Object.entries(clip.attributes)) {
    const dd = make('dd', '', String(typeof value === 'number' ? +value.toPrecision(4) : value));
    if (clip.how[name]) dd.append(make('small', '', clip.how[name]));
    at('attributes').append(make('dt', '', name.replaceAll('_', ' ')), dd);
  }
}

async function toggleRecording() {
  if (page.recorder === 'opening') return;
  if (page.recorder) return endRecording();
  showError('sound-error', null);
  at('player').pause();
  const limit = page.about.limits.seconds;
  const levels = [];
  page.recorder = 'opening';
  try {
    page.recorder = await startRecording((level, seconds) => {
      levels.push(level);
      drawLevels(at('wave'), levels);
      at('record-label').textContent = `Stop (${seconds.toFixed(0)} of ${limit} s)`;
      if (seconds >= limit - 0.2) endRecording();
    }, endRecording);
  } catch (error) {
    page.recorder = null;
    showError('sound-error', error);
    return;
  }
  at('record').setAttribute('aria-pressed', 'true');
  at('record-label').textContent = 'Stop';
  at('no-sound').hidden = true;
  at('stage').hidden = false;
  at('told').hidden = true;
  at('clip-name').textContent = 'Recording';
  at('clip-length').textContent = '';
  at('stage').querySelector('.drawing').classList.add('live');
  at('playhead').hidden = true;
  say('Recording; the same button stops it.');
}

// The microphone is let go of; gives the recording that was under way, if any.
function dropRecording() {
  const { recorder } = page;
  if (!recorder || recorder === 'opening') return null;
  page.recorder = null;
  at('record').setAttribute('aria-pressed', 'false');
  at('record-label').textContent = 'Record';
  at('stage').querySelector('.drawing').classList.remove('live');
  return recorder.stop();
}

async function endRecording() {
  const sound = await dropRecording();
  if (!sound) return;
  page.recordings = (page.recordings || 0) + 1;
  await choose(() => sendSamples(sound, `Recording ${page.recordings}`, page.about.limits));
  if (page.samples) showKept();
  else { at('stage').hidden = true; at('no-sound').hidden = false; }
}

// After a recording that could not be used: what was there before.
function showKept() {
  if (!page.clip) return;
  at('clip-name').textContent = page.clip.name;
  at('clip-length').textContent = `${page.clip.duration_s.toFixed(1)} s`;
  draw();
  tell();
}

// ---------------------------------------------------------------- the question

function startConversation() {
  if (page.asking) page.asking.abort();
  page.conversation = new Conversation(page.clip);
  at('fresh').hidden = true;
}

function beside() {
  return [...at('beside').querySelectorAll('input:checked')].map((box) => box.value);
}

// A new question may be asked once the model has answered; what is still being written beside it then ends.
async function ask() {
  const question = at('question').value.trim();
  showError('talk-error', null);
  if (page.asking && !page.asking.heard) return; // the model is still answering
  if (!question) {
    showError('talk-error', new Error('Type a question, or take one of those below.'));
    at('question').focus();
    return;
  }
  const { limits, voices } = page.about;
  const newTokens = Math.round(Number(at('new-tokens').value));
  if (!(newTokens >= 1 && newTokens <= limits.new_tokens)) {
    at('settings').open = true;
    showError('talk-error', new Error(`The longest answer must have from 1 to ${limits.new_tokens} tokens.`));
    at('new-tokens').focus();
    return;
  }
  if (page.asking) {
    page.asking.abort();
    await page.asking.over;
    if (page.asking) return;
  }
  if (!page.conversation) startConversation();
  const conversation = page.conversation;
  const asked = voices.filter((voice) => voice === 'model' || (conversation.clip && beside().includes(voice)));
  if (!conversation.box.isConnected) {
    for (const past of at('talks').children) past.classList.add('past');
    at('talks').prepend(conversation.box);
    while (at('talks').children.length > 20) at('talks').lastChild.remove();
  }
  const turn = conversation.begin(question, asked);
  const abort = new AbortController();
  page.asking = abort;
  abort.over = new Promise((done) => { abort.done = done; });
  at('ask').disabled = true;
  at('stop').hidden = false;
  turn.box.scrollIntoView({ block: 'nearest' });
  try {
    const body = {
      question,
      clip: conversation.clip ? conversation.clip.id : null,
      turns: conversation.turns,
      voices: asked,
      max_new_tokens: newTokens,
      temperature: Number(at('temperature').value),
      seed: Math.floor(Math.random() * 2 ** 31),
    };
    say('');
    await stream('/ask', body, abort.signal, (event) => {
      if (event.event === 'waiting') say(`Waiting: ${plural(event.before, 'other')} first ...`);
      else if (event.event === 'describing') say('Describing the sound first ...');
      else if (event.event === 'undescribed') say(event.error);
      else if (event.event === 'described') {
        Object.assign(conversation.clip, event.clip);
        if (conversation.clip === page.clip) tell();
        say('');
      } else if (event.event === 'begin') say('');
      conversation.take(turn, event);
      if (event.event === 'end' && event.voice === 'model') {
        announce(`The model says: ${event.text || 'nothing'}`);
        abort.heard = true;
        at('ask').disabled = false;
      }
    });
  } catch (error) {
    if (error.name !== 'AbortError') showError('talk-error', error);
  } finally {
    conversation.close(turn);
    if (page.asking === abort) {
      page.asking = null;
      at('ask').disabled = false;
      at('stop').hidden = true;
    }
    if (conversation === page.conversation) at('fresh').hidden = !conversation.turns.length;
    abort.done();
  }
}

function take(text) {
  at('question').value = text;
  at('question').focus();
}

function offerPrompts({ first, ideas, trained, new: unseen }) {
  const group = (label, texts) => {
    if (!texts.length) return;
    const box = Object.assign(document.createElement('optgroup'), { label });
    for (const text of texts) box.append(Object.assign(document.createElement('option'), { value: text, textContent: text }));
    at('pool').append(box);
  };
  group('It was trained on these', trained);
  group('New to it', unseen);
  if (!trained.length && !unseen.length) {
    at('pool').previousElementSibling.hidden = true;
    at('pool').hidden = true;
  }
  for (const text of new Set([first, ...ideas])) {
    const button = Object.assign(make('button', '', text), { type: 'button' });
    button.addEventListener('click', () => { at('question').value = text; ask(); });
    at('ideas').append(button);
  }
  at('question').value = first;
}

// ---------------------------------------------------------------- the beginning

function wire() {
  at('record').addEventListener('click', toggleRecording);
  at('file').addEventListener('change', () => {
    const [file] = at('file').files;
    at('file').value = ''; // so that the same file can be chosen again
    if (file) choose(() => sendFile(file, page.about.limits));
  });
  at('form').addEventListener('submit', (event) => { event.preventDefault(); ask(); });
  at('question').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  });
  at('stop').addEventListener('click', () => { if (page.asking) page.asking.abort(); });
  at('fresh').addEventListener('click', () => { startConversation(); take(''); });
  at('pool').addEventListener('change', () => { if (at('pool').value) take(at('pool').value); at('pool').value = ''; });
  const warm = () => { at('temperature-told').value = Number(at('temperature').value) ? at('temperature').value : '0 (always the same)'; };
  at('temperature').addEventListener('input', warm);
  warm();
  at('player').addEventListener('play', moveHead);
  for (const name of ['pause', 'seeked', 'ended']) at('player').addEventListener(name, moveHead);
  for (const id of ['wave', 'spectrogram']) {
    at(id).addEventListener('click', (event) => {
      const { duration } = at('player');
      if (duration && !page.recorder) at('player').currentTime = (event.offsetX / at(id).clientWidth) * duration;
    });
  }
  let inside = 0;
  const overlay = (shown) => { at('drop').hidden = !shown; };
  addEventListener('dragenter', (event) => { event.preventDefault(); inside++; overlay([...event.dataTransfer.types].includes('Files')); });
  addEventListener('dragleave', () => { inside = Math.max(0, inside - 1); if (!inside) overlay(false); });
  addEventListener('dragover', (event) => event.preventDefault());
  addEventListener('drop', (event) => {
    event.preventDefault();
    inside = 0;
    overlay(false);
    const [file] = event.dataTransfer.files;
    if (file) choose(() => sendFile(file, page.about.limits));
  });
  new ResizeObserver(draw).observe(at('stage'));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
}

async function begin() {
  try {
    page.about = await (await fetch('/about')).json();
  } catch {
    showError('sound-error', new Error('The server cannot be reached; see whether it still runs in its terminal.'));
    return;
  }
  const { about } = page;
  const { llm, encoder } = about.parts;
  at('model').textContent = [about.model, llm && encoder ? `${llm} hears through ${encoder}` : ''].filter(Boolean).join('  ·  ');
  document.title = `What can you hear? ${about.model}`;
  if (!about.hears) VOICES.model.title = 'The model, reading what stands for the sound';
  at('new-tokens').max = about.limits.new_tokens;
  at('new-tokens').value = about.max_new_tokens;
  for (const voice of about.voices.filter((name) => name !== 'model')) {
    const label = make('label');
    label.append(Object.assign(document.createElement('input'), { type: 'checkbox', value: voice, checked: true }));
    const words = make('span', '', VOICES[voice].title);
    words.append(make('small', '', ` (${VOICES[voice].hint})`));
    label.append(words);
    at('beside').append(label);
  }
  at('beside').hidden = about.voices.length < 2;
  at('lead-beside').hidden = about.voices.length < 3;
  offerPrompts(about.prompts);
  for (const clip of about.examples) {
    const button = Object.assign(make('button', '', clip.name), { type: 'button' });
    button.dataset.id = clip.id;
    button.setAttribute('aria-pressed', 'false');
    button.addEventListener('click', () => choose(async () => ({ clip, note: '' })));
    at('example-list').append(button);
  }
  at('examples').hidden = !about.examples.length;
  wire();
}

begin();
