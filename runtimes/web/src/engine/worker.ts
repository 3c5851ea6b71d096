/** One engine in a thread of its own, so that the page stays awake. */
import { AppError, told } from "../errors";
import { answer } from "./answer";
import type { FromWorker, Replies, Request, ToWorker } from "./messages";
import { type Model, openModel } from "./model";
import { loadOrt } from "./ort";
import { decodePicture } from "./pixels";
import { checkValues } from "./selftest";

let model: Model | undefined;
let stopped = false;
let busy: Promise<unknown> = Promise.resolve(); // one request after the other

const say = (message: FromWorker): void => self.postMessage(message);

self.onmessage = ({ data }: MessageEvent<ToWorker>) => {
  if ("stop" in data) {
    stopped = true;
    return;
  }
  const { id, request } = data;
  busy = busy.then(async () => {
    try {
      say({ id, kind: "done", value: await serve(id, request) });
    } catch (error) {
      say({ id, kind: "failed", error: told(error) });
    }
  });
};

async function serve(id: number, request: Request): Promise<Replies[keyof Replies]> {
  if (request.kind === "open") {
    const start = performance.now();
    const ort = await loadOrt(request.provider, request.home, request.threads);
    const { origin, manifest, precision, provider } = request;
    model = await openModel(ort, provider, origin, manifest, precision, (done, total, what) =>
      say({ id, kind: "loading", done, total, what }),
    );
    return { load_ms: performance.now() - start, ort: ort.env.versions.web ?? ort.env.versions.common };
  }
  if (!model) throw new AppError("the model isn't loaded", "wait until it is");
  if (request.kind === "check") return checkValues(model);
  if (request.kind === "pixels") return model.pixels(await decodePicture(request.picture, model.spec.image_policy));
  stopped = false;
  const { picture, question, maxTokens } = request;
  return answer(model, {
    picture,
    question,
    maxTokens,
    onText: (piece) => say({ id, kind: "text", piece }),
    stopped: () => stopped,
  });
}
