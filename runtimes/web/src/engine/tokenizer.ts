/** Sections of plain text → ids, and ids → bytes; the rules are those of `tokenizer_sections` in the package. */
import { Tokenizer } from "@huggingface/tokenizers";

export interface SectionTokenizer {
  /** ids in front of every prompt */
  readonly bos: readonly number[];
  /** section at the start or after a picture → ids; the text of a special token stays plain text */
  encode(section: string): number[];
  /** what an id stands for in an answer; special tokens stand for nothing */
  bytes(id: number): Uint8Array;
}

interface Component {
  readonly type?: string;
  readonly [key: string]: unknown;
}
interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
}
export interface TokenizerJson {
  readonly added_tokens: readonly AddedToken[];
  readonly normalizer: Component | null;
  readonly pre_tokenizer: Component | null;
  readonly decoder: Component | null;
  readonly model: { readonly vocab: Readonly<Record<string, number>> | readonly (readonly [string, number])[] };
}

const PIECE_SPACE = "\u2581";

export function sectionTokenizer(json: TokenizerJson, config: { chat_template?: unknown }): SectionTokenizer {
  const whole = new Tokenizer(json, {});
  const added = spaceInFront(json, config);
  // Special tokens are left out, so that their text in a question is read as any other.
  const bare: TokenizerJson = {
    ...json,
    added_tokens: json.added_tokens.filter((token) => !token.special),
    ...(added === "never" ? {} : { normalizer: replaceSpaces(), pre_tokenizer: null }),
  };
  const sections = new Tokenizer(bare, {});
  return {
    bos: whole.encode("", { add_special_tokens: true }).ids,
    encode: (section) => {
      if (!section) return [];
      return sections.encode(added === "never" ? section : ` ${section}`, { add_special_tokens: false }).ids;
    },
    bytes: tokenBytes(json),
  };
}

/** Where a space goes in front: `always` and `first` are the same for the sections of one question. */
function spaceInFront(json: TokenizerJson, config: { chat_template?: unknown }): "always" | "first" | "never" {
  if (has(json.normalizer, "Prepend", "normalizers")) return "always";
  const scheme = find(json.pre_tokenizer, "Metaspace", "pretokenizers")?.["prepend_scheme"];
  if (scheme === "always" || scheme === "first") return scheme;
  // The export takes the rule out of tokenizer.json and leaves the space to its chat template.
  const template = typeof config.chat_template === "string" ? config.chat_template : "";
  return template.includes('{%- set SPACE = " " -%}') ? "first" : "never";
}

function replaceSpaces(): Component {
  return { type: "Replace", pattern: { String: " " }, content: PIECE_SPACE };
}

function tokenBytes(json: TokenizerJson): (id: number) => Uint8Array {
  const spelling: string[] = [];
  const vocab = json.model.vocab;
  if (Array.isArray(vocab)) for (const [id, [text]] of vocab.entries()) spelling[id] = text as string;
  else for (const [text, id] of Object.entries(vocab)) spelling[id] = text;
  const special = new Map(json.added_tokens.map((token) => [token.id, token]));
  const pieces = has(json.decoder, "ByteFallback", "decoders") || has(json.decoder, "Metaspace", "decoders");
  const alphabet = byteAlphabet();
  const utf8 = new TextEncoder();
  return (id) => {
    const token = special.get(id);
    if (token?.special) return new Uint8Array();
    const text = token?.content ?? spelling[id];
    if (text === undefined) return new Uint8Array();
    if (pieces) {
      const byte = /^<0x([0-9A-F]{2})>$/.exec(text)?.[1];
      return byte === undefined ? utf8.encode(text.replaceAll(PIECE_SPACE, " ")) : Uint8Array.of(parseInt(byte, 16));
    }
    return token ? utf8.encode(text) : Uint8Array.from([...text], (letter) => alphabet.get(letter) ?? 0);
  };
}

/** The letters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on. */
function byteAlphabet(): Map<string, number> {
  const found = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const plain = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    found.set(String.fromCodePoint(plain ? byte : next++), byte);
  }
  return found;
}

function find(state: Component | null, kind: string, parts: string): Component | undefined {
  if (!state) return undefined;
  const inner = state[parts];
  return [state, ...(Array.isArray(inner) ? (inner as Component[]) : [])].find((part) => part.type === kind);
}

const has = (state: Component | null, kind: string, parts: string): boolean => find(state, kind, parts) !== undefined;
