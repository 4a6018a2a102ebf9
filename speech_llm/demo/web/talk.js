// The conversation: what was asked, and the answers of each voice as they are written.

const VOICES = {
  model: { title: 'The model, hearing the sound', short: '', hint: '' },
  description: { title: 'Text LLM with the description', short: 'ceiling', hint: 'the same LLM, given the description in place of the sound' },
  silent: { title: 'Text LLM without the sound', short: 'guess', hint: 'the same LLM, given the question alone' },
};

const make = (tag, name = '', text = '') => Object.assign(document.createElement(tag), { className: name, textContent: text });

// Talk about one sound (or none); `turns` is what is sent along with the next question.
class Conversation {
  constructor(clip) {
    this.clip = clip;
    this.turns = [];
    this.box = make('article', 'conversation');
    this.box.append(make('h3', '', clip ? clip.name : 'Without a sound'));
  }

  // A turn with an empty place for each voice; gives what takes the events.
  begin(question, voices) {
    const turn = { question, answers: {} };
    const box = make('div', 'turn');
    const answers = make('div', 'answers');
    box.append(make('p', 'asked', question), answers);
    const places = {};
    voices.forEach((voice, number) => {
      const place = make('section', `answer ${voice} waits`);
      const said = make('p', 'said');
      const foot = make('div', 'foot');
      const title = make('h4', '', voices.length === 1 && !this.clip ? 'The model, without a sound' : VOICES[voice].title);
      if (VOICES[voice].short) title.append(make('small', '', VOICES[voice].short));
      if (number && voices.length === 2) place.classList.add('alone');
      place.append(title, said, foot);
      answers.append(place);
      places[voice] = { place, said, foot };
    });
    this.box.firstChild.after(box); // the newest is next to where it was asked
    return { turn, places, box };
  }

  // One event of the server's about a turn.
  take({ turn, places }, event) {
    const at = places[event.voice];
    if (!at) return;
    at.place.classList.remove('waits');
    if (event.event === 'begin') {
      at.place.classList.add('writes');
      if (event.reads) {
        const details = make('details');
        details.append(make('summary', '', 'What it reads'), make('p', '', event.reads));
        at.foot.append(details);
      }
    } else if (event.event === 'text') {
      at.said.textContent = event.all !== undefined ? event.all : at.said.textContent + event.add;
    } else if (event.event === 'end') {
      at.place.classList.remove('writes');
      at.said.textContent = event.text || '(nothing)';
      at.foot.prepend(make('span', '', `${event.seconds.toFixed(1)} s${event.cut ? ', cut at the longest that is allowed' : ''}`));
      turn.answers[event.voice] = event.text;
    } else if (event.event === 'failed') {
      at.place.classList.replace('writes', 'failed') || at.place.classList.add('failed');
      at.said.textContent = event.error;
    }
  }

  // Nothing more will come of a turn; it counts when the model has answered.
  close({ turn, places, box }) {
    for (const { place, said } of Object.values(places)) {
      if (place.classList.contains('waits') || place.classList.contains('writes')) {
        place.classList.remove('waits', 'writes');
        if (!said.textContent) said.textContent = '(stopped)';
      }
    }
    if (turn.answers.model) this.turns.push(turn);
    else box.dataset.unanswered = '';
  }
}

// Ask, and hand each event on as it comes. Throws an Error with a sentence.
async function stream(path, body, signal, onEvent) {
  let reply;
  try {
    reply = await fetch(path, { method: 'POST', body: JSON.stringify(body), signal, headers: { 'Content-Type': 'application/json' } });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server cannot be reached; see whether it still runs in its terminal.');
  }
  if (!reply.ok) throw new Error((await reply.json()).error);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '', ended = false;
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new Error('The server ended in the middle of the answer; see its terminal.');
    }
    if (piece.done) break;
    const lines = (rest + piece.value).split('\n');
    rest = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const event = JSON.parse(line);
      if (event.event === 'error') throw new Error(event.error);
      ended = ended || event.event === 'done' || event.event === 'described';
      onEvent(event);
    }
  }
  if (!ended) throw new Error('The server ended in the middle of the answer; see its terminal.');
}
