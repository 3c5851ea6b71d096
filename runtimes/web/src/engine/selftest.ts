/** A known input through the bundle's own graphs: does this provider compute what WebAssembly computes? */
import type { Model } from "./model";

/** Relative error that two right providers stay below: 1 % where activations are rounded to 8 bits, 1e-6 elsewhere. */
export const TOLERANCE = 0.05;
const QUESTION = "What is in the picture?";
const MOST_VALUES = 4096;

/** Three vectors, one behind the other: image embeddings (thinned), logits of the prompt, logits of a second step. */
export interface CheckValues {
  readonly vision: Float32Array;
  readonly prefill: Float32Array;
  readonly step: Float32Array;
}

export interface Verdict {
  readonly passed: boolean;
  /** relative error, |a − b| / |b|, of each vector */
  readonly errors: Readonly<Record<keyof CheckValues, number>>;
}

export async function checkValues(model: Model): Promise<CheckValues> {
  const image = await model.vision(noise(3 * model.spec.image_size ** 2));
  const { rows } = await model.prompt(QUESTION, image);
  const decoder = model.decoder();
  try {
    const prefill = Float32Array.from(await decoder.step(rows));
    // The same second position whatever the logits were, so that only this step's own error counts.
    const step = Float32Array.from(await decoder.step(rows.slice(0, model.spec.embedding_dim)));
    return { vision: thin(image), prefill: thin(prefill), step: thin(step) };
  } finally {
    decoder.close();
  }
}

export function compare(given: CheckValues, wanted: CheckValues): Verdict {
  const errors = {
    vision: relative(given.vision, wanted.vision),
    prefill: relative(given.prefill, wanted.prefill),
    step: relative(given.step, wanted.step),
  };
  return { passed: Object.values(errors).every((error) => error <= TOLERANCE), errors };
}

/** Whether values are finite and not all the same: what can be said where there is nothing to compare with. */
export function plausible(values: CheckValues): boolean {
  return Object.values(values).every((vector: Float32Array) => {
    return vector.every(Number.isFinite) && vector.some((value) => value !== vector[0]);
  });
}

export function pack(values: CheckValues): Uint8Array<ArrayBuffer> {
  const vectors = [values.vision, values.prefill, values.step];
  const flat = Float32Array.from([...vectors.map((one) => one.length), ...vectors.flatMap((one) => [...one])]);
  return new Uint8Array(flat.buffer);
}

export function unpack(bytes: ArrayBuffer): CheckValues | undefined {
  if (bytes.byteLength % 4) return undefined;
  const flat = new Float32Array(bytes);
  const [a, b, c] = flat;
  if (a === undefined || b === undefined || c === undefined || flat.length !== 3 + a + b + c) return undefined;
  return { vision: flat.slice(3, 3 + a), prefill: flat.slice(3 + a, 3 + a + b), step: flat.slice(3 + a + b) };
}

/** Error of a vector as a share of it; infinite where anything is not a number. */
function relative(given: Float32Array, wanted: Float32Array): number {
  if (given.length !== wanted.length) return Infinity;
  let [off, size] = [0, 0];
  for (const [place, value] of wanted.entries()) {
    off += (given[place]! - value) ** 2;
    size += value ** 2;
  }
  const error = Math.sqrt(off / size);
  return Number.isFinite(error) ? error : Infinity;
}

/** Numbers in −1 … 1, the same everywhere. */
function noise(length: number): Float32Array {
  let state = 12345;
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 0x80000000 - 1;
  });
}

function thin(values: Float32Array): Float32Array {
  const step = Math.ceil(values.length / MOST_VALUES);
  return values.filter((_, place) => place % step === 0);
}

