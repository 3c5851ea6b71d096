// Answers one prompt with transformers.js, offline, and prints one JSON document.
//
//   node transformers_js.mjs MODULES REQUEST.json
//
// MODULES is a node_modules folder with @huggingface/transformers. REQUEST: {model, dtype, max_new_tokens, question,
// image: {file, width, height}, pixel_values: {file, side} or null}; files hold raw bytes. With `pixel_values` the
// picture's pixels are replaced by them, so that resampling does not blur what is compared.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, requestFile] = process.argv.slice(2);
const entry = createRequire(join(modules, "index.js")).resolve("@huggingface/transformers");
const tf = await import(pathToFileURL(entry));
const request = JSON.parse(readFileSync(requestFile, "utf-8"));

tf.env.allowRemoteModels = false;
tf.env.localModelPath = dirname(request.model);
const name = basename(request.model);
const processor = await tf.AutoProcessor.from_pretrained(name);
const model = await tf.LlavaForConditionalGeneration.from_pretrained(name, request.dtype ? { dtype: request.dtype } : {});

const rgb = new Uint8ClampedArray(readFileSync(request.image.file));
const image = new tf.RawImage(rgb, request.image.width, request.image.height, 3);
const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: request.question }] }];
const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
const inputs = await processor(image, prompt);
const pixels = Array.from(inputs.pixel_values.data);
if (request.pixel_values) {
  const raw = readFileSync(request.pixel_values.file);
  const values = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length));
  const { side } = request.pixel_values;
  inputs.pixel_values = new tf.Tensor("float32", values, [1, 3, side, side]);
}
const out = await model.generate({ ...inputs, max_new_tokens: request.max_new_tokens });
const ids = inputs.input_ids.tolist()[0].map(Number);
const tokens = out.tolist()[0].map(Number).slice(ids.length);
const answer = processor.decode(tokens, { skip_special_tokens: true });
console.log(JSON.stringify({ version: tf.env.version, prompt, ids, tokens, answer, pixels }));
