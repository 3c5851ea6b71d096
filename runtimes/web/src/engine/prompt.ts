/** One question → the ids of its prompt, as `conversation_ids` of the package makes them. */
import { AppError } from "../errors";
import type { SectionTokenizer } from "./tokenizer";

export const IMAGE_PLACE = -200; // marks the picture's place among the ids
const MARKER = "<image>";
const SYSTEM =
  "A chat between a curious user and an artificial intelligence assistant. " +
  "The assistant gives helpful, detailed, and polite answers to the user's questions.";

// Python's white space; JavaScript's own trim knows another set.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const LEADING = new RegExp(`^[${SPACE}]+`, "u");
const TRAILING = new RegExp(`[${SPACE}]+$`, "u");

export const stripStart = (text: string): string => text.replace(LEADING, "");
export const stripEnd = (text: string): string => text.replace(TRAILING, "");

interface Template {
  readonly system: string;
  readonly captionOnly: boolean;
}

const CHAT: Template = { system: SYSTEM, captionOnly: false };
const TEMPLATES: Readonly<Record<string, Template>> = {
  llama: CHAT,
  phi: CHAT,
  gemma: CHAT,
  qwen2_base: CHAT,
  qwen2_instruct: CHAT,
  pretrain: { system: "", captionOnly: true },
};

/** Throws AppError: an unknown template, an empty question, or text with half a surrogate pair. */
export function promptIds(question: string, name: string, tokenizer: SectionTokenizer, hasImage: boolean): number[] {
  const template = TEMPLATES[name];
  if (!template) throw new AppError(`the model speaks template ${name}`, "use a newer version of this page");
  const words = clean(question);
  const start = [...tokenizer.bos];
  if (template.captionOnly) {
    if (!hasImage) throw new AppError("this model describes pictures only", "choose a picture");
    return [...start, IMAGE_PLACE];
  }
  const head = `${template.system} USER: `;
  const tail = `${words} ASSISTANT:`;
  if (!hasImage) return [...start, ...tokenizer.encode(head + tail)];
  return [...start, ...tokenizer.encode(head), IMAGE_PLACE, ...tokenizer.encode(`\n${tail}`)];
}

function clean(question: string): string {
  if (/\p{Surrogate}/u.test(question)) throw new AppError("the question is not valid Unicode", "type it again");
  const words = stripEnd(stripStart(question.replaceAll(MARKER, "")));
  if (!words) throw new AppError("the question is empty", "ask something, e.g. “What is in the picture?”");
  return words;
}
