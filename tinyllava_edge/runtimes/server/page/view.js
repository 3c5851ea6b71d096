// Turns of the conversation as elements. Whatever a person or the model wrote goes in as text, never as markup.

import { thumbnail } from "./pictures.js";

const STAGES = [
  ["load_ms", "Load model"],
  ["queue_ms", "Queue"],
  ["decode_image_ms", "Decode image"],
  ["preprocess_ms", "Preprocess"],
  ["vision_ms", "Vision"],
  ["prefill_ms", "Prefill"],
  ["first_token_ms", "First token"],
  ["decode_ms", "Decode"],
];

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, onClick) {
  const element = make("button", "quiet small", text);
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}

export class TurnView {
  constructor(turn) {
    this.root = make("article", "turn");
    const question = make("div", "question");
    if (turn.pictures.length) {
      const shown = make("ul", "shown");
      for (const item of turn.pictures) {
        const entry = make("li");
        entry.append(thumbnail(item));
        shown.append(entry);
      }
      question.append(shown);
    }
    question.append(make("p", "words", turn.question));
    this.answer = make("div", "answer");
    this.root.append(question, this.answer);
    this.begin();
  }

  begin() {
    this.words = make("p", "words");
    this.answer.setAttribute("aria-busy", "true");
    this.answer.replaceChildren(this.words);
  }

  piece(text) {
    this.words.append(text);
  }

  done({ finish, usage, timings }, copy) {
    this.answer.setAttribute("aria-busy", "false");
    if (!this.words.textContent) this.words.replaceWith(make("p", "aside", "The model had nothing to say."));
    if (finish === "length") this.answer.append(make("p", "aside", "Cut off at the longest answer allowed."));
    if (timings) this.answer.append(timingsView(timings, usage));
    this.answer.append(this.row(copy));
  }

  stopped(copy) {
    this.answer.setAttribute("aria-busy", "false");
    if (!this.words.textContent) this.words.remove();
    this.answer.append(make("p", "aside", "Stopped."));
    if (this.words.textContent) this.answer.append(this.row(copy));
  }

  failed(message, actions) {
    this.answer.setAttribute("aria-busy", "false");
    if (!this.words.textContent) this.words.remove();
    const box = make("div", "failure");
    box.setAttribute("role", "alert");
    const row = make("div", "row");
    row.append(...actions.map(([text, onClick]) => button(text, onClick)));
    box.append(make("p", "", message), row);
    this.answer.append(box);
  }

  row(copy) {
    const row = make("div", "row");
    const element = button("Copy answer", async () => {
      element.textContent = (await copy()) ? "Copied" : "Can't copy here";
      setTimeout(() => { element.textContent = "Copy answer"; }, 1500);
    });
    row.append(element);
    return row;
  }
}

function timingsView(timings, usage) {
  const stages = STAGES.map(([key, name]) => [key, name, timings[key] ?? 0]).filter(([, , ms]) => ms > 0);
  const root = make("div", "timings");
  const track = make("div", "track");
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", stages.map(([, name, ms]) => `${name} ${time(ms)}`).join(", "));
  for (const [key, name, ms] of stages) {
    const part = make("span", key);
    part.style.flexGrow = String(ms);
    part.title = `${name} ${time(ms)}`;
    track.append(part);
  }
  const details = make("details");
  const facts = [`First token ${time(timings.ttft_ms)}`];
  if (timings.decode_tokens_per_s) facts.push(`${timings.decode_tokens_per_s.toFixed(timings.decode_tokens_per_s < 10 ? 1 : 0)} tokens/s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    facts.push(`${usage.prompt_tokens} prompt tokens, ${cached} cached`, `${usage.completion_tokens} answer tokens`);
  }
  const list = make("dl");
  for (const [key, name, ms] of stages) {
    const entry = make("div");
    entry.append(make("span", `dot ${key}`), make("dt", "", name), make("dd", "", time(ms)));
    list.append(entry);
  }
  details.append(make("summary", "", facts.join(" · ")), list);
  root.append(track, details);
  return root;
}

function time(ms) {
  if (ms >= 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 100 ? `${ms.toFixed(0)} ms` : ms >= 1 ? `${ms.toFixed(1)} ms` : `${ms.toFixed(2)} ms`;
}
