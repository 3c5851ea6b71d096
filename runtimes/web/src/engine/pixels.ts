/** A picture file → upright RGB, unscaled: the values that Pillow's `convert("RGB")` gives. */
import { AppError } from "../errors";

export interface Rgb {
  /** height × width × 3 */
  readonly data: Uint8Array;
  readonly width: number;
  readonly height: number;
}

// The limits of the package's image module.
const MAX_FILE_BYTES = 64 << 20;
const MAX_PIXELS = 50_000_000;
const MAX_SIDE = 20_000;
const MAX_ASPECT = 1000;

/** Throws AppError: not a picture that this browser reads, or beyond a limit. */
export async function decodePicture(file: Blob, policy: string): Promise<Rgb> {
  if (file.size > MAX_FILE_BYTES) throw new AppError("the picture file is over 64 MiB", "scale the picture down first");
  let bitmap: ImageBitmap;
  try {
    // No colour management and no multiplication by alpha: the model was trained on the file's own numbers.
    bitmap = await createImageBitmap(file, {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
      imageOrientation: "from-image",
    });
  } catch {
    throw new AppError("this is not a picture that the browser can read", "give a PNG, JPEG, WebP, GIF or BMP picture");
  }
  try {
    const { width, height } = bitmap;
    checkSize(width, height, policy);
    const rgba = readOpaque(bitmap) ?? readTransparent(bitmap);
    return { data: dropAlpha(rgba), width, height };
  } finally {
    bitmap.close();
  }
}

function checkSize(width: number, height: number, policy: string): void {
  const [long, short] = [Math.max(width, height), Math.min(width, height)];
  if (width * height > MAX_PIXELS || long > MAX_SIDE || (policy === "pad" && long * long > 2 * MAX_PIXELS)) {
    throw new AppError(`the picture is ${width} × ${height} pixels, too many`, "scale the picture down first");
  }
  if (long > MAX_ASPECT * short) throw new AppError("the picture is thinner than 1:1000", "crop the picture first");
}

/** RGBA by a 2D canvas, which is exact where every pixel is opaque; undefined elsewhere. */
function readOpaque(bitmap: ImageBitmap): Uint8ClampedArray | undefined {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new AppError("the browser gives no canvas to read pictures with", "try another browser");
  probe(context);
  context.clearRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let place = 3; place < data.length; place += 4) if (data[place] !== 255) return undefined;
  return data;
}

/** Some browsers blur what a canvas gives back, against fingerprinting; the answer would silently be another's. */
function probe(context: OffscreenCanvasRenderingContext2D): void {
  const { width, height } = context.canvas;
  const [w, h] = [Math.min(16, width), Math.min(16, height)];
  const given = new ImageData(w, h);
  for (let place = 0; place < given.data.length; place++) given.data[place] = place % 4 === 3 ? 255 : (place * 37) % 251;
  context.putImageData(given, 0, 0);
  const found = context.getImageData(0, 0, w, h).data;
  if (given.data.some((value, place) => value !== found[place])) {
    throw new AppError("this browser changes the pixels that pages read", "allow this page to read canvas data");
  }
}

/** RGBA through WebGL, which alone keeps the colour under transparent pixels. */
function readTransparent(bitmap: ImageBitmap): Uint8Array {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) throw new AppError("the picture is transparent, which needs WebGL here", "save it without transparency");
  if (Math.max(width, height) > Number(gl.getParameter(gl.MAX_TEXTURE_SIZE))) {
    throw new AppError("the transparent picture is too large for WebGL", "scale the picture down first");
  }
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, 0);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const data = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return data;
}

function dropAlpha(rgba: Uint8Array | Uint8ClampedArray): Uint8Array {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    rgb[to] = rgba[from]!;
    rgb[to + 1] = rgba[from + 1]!;
    rgb[to + 2] = rgba[from + 2]!;
  }
  return rgb;
}
