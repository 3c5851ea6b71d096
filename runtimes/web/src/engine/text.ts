/** Bytes of tokens → text, given out as soon as it is certain; what was given out, joined, is the whole text. */
import { stripEnd, stripStart } from "./prompt";

export interface TextStream {
  push(bytes: Uint8Array): void;
  /** the whole text */
  finish(): string;
}

export function textStream(onText: (piece: string) => void): TextStream {
  const decoder = new TextDecoder();
  let pending = "";
  let whole = "";
  const give = (text: string): void => {
    pending += text;
    if (!whole) pending = stripStart(pending);
    const ready = stripEnd(pending);
    if (!ready) return;
    pending = pending.slice(ready.length);
    whole += ready;
    onText(ready);
  };
  return {
    push: (bytes) => give(decoder.decode(bytes, { stream: true })),
    finish: () => {
      give(decoder.decode());
      return whole;
    },
  };
}
