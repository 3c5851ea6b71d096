// Pictures on their way into a question: chosen, dropped, pasted or taken. Their bytes are sent as they are.

export class Pictures {
  constructor({ list, limits, onChange, complain }) {
    this.items = [];
    this.list = list;
    this.limits = limits;
    this.onChange = onChange;
    this.complain = complain;
  }

  add(files) {
    const { maxBytes, maxCount } = this.limits();
    for (const file of files) {
      if (!file.type.startsWith("image/") && !/\.(tiff?|ppm|bmp|webp)$/i.test(file.name)) {
        this.complain(`${file.name || "That"} is not a picture.`);
      } else if (file.size > maxBytes) {
        this.complain(`${file.name || "The picture"} has ${megabytes(file.size)}; the server takes up to ${megabytes(maxBytes)}.`);
      } else if (this.items.length >= maxCount) {
        this.complain(`The server takes up to ${maxCount} pictures at once.`);
        break;
      } else {
        this.items.push({ file, name: file.name || "picture", url: URL.createObjectURL(file) });
      }
    }
    this.render();
  }

  // Hand the pictures over to a question.
  take() {
    const taken = this.items;
    this.items = [];
    this.render();
    return taken;
  }

  put(items) {
    this.items = items;
    this.render();
  }

  clear() {
    for (const item of this.take()) URL.revokeObjectURL(item.url);
  }

  render() {
    this.list.hidden = this.items.length === 0;
    this.list.replaceChildren(...this.items.map((item, index) => {
      const entry = document.createElement("li");
      const remove = document.createElement("button");
      remove.type = "button";
      remove.title = "Remove";
      remove.setAttribute("aria-label", `Remove ${item.name}`);
      remove.append(cross());
      remove.addEventListener("click", () => {
        URL.revokeObjectURL(item.url);
        this.items.splice(index, 1);
        this.render();
        (this.list.querySelectorAll("button")[Math.min(index, this.items.length - 1)] ?? document.getElementById("question")).focus();
      });
      entry.append(thumbnail(item), remove);
      return entry;
    }));
    this.onChange();
  }
}

// The picture, or a tile with its name where the browser can't show the format (TIFF, say).
export function thumbnail(item) {
  const image = new Image();
  image.src = item.url;
  image.alt = item.name;
  image.addEventListener("error", () => {
    const tile = document.createElement("span");
    tile.className = "tile";
    tile.textContent = item.name;
    image.replaceWith(tile);
  });
  return image;
}

// data: URL of a file's bytes, made once.
export async function dataUrl(item) {
  item.data ??= await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new Error(`${item.name} can't be read; it may have been moved.`));
    reader.readAsDataURL(item.file);
  });
  const kind = /^image\/[a-z0-9.+-]{1,40}$/.test(item.file.type) ? item.file.type : "image/png";
  return `data:${kind};base64,${item.data.slice(item.data.indexOf(",") + 1)}`;
}

// One photo from the camera in a dialog; null if cancelled. Throws where no camera can be used.
export async function takePhoto(dialog, video, shoot, cancel) {
  if (!navigator.mediaDevices?.getUserMedia) throw new Error("no camera");
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: { ideal: "environment" }, width: { ideal: 1920 } } });
  video.srcObject = stream;
  dialog.showModal();
  shoot.focus();
  try {
    const taken = await new Promise((resolve) => {
      shoot.onclick = () => resolve(true);
      cancel.onclick = () => resolve(false);
      dialog.onclose = () => resolve(false);
    });
    if (!taken || !video.videoWidth) return null;
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    return new File([blob], "photo.png", { type: "image/png" });
  } finally {
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
    dialog.close();
  }
}

export function megabytes(bytes) {
  return `${(bytes / (1 << 20)).toFixed(bytes < 10 << 20 ? 1 : 0)} MB`;
}

function cross() {
  const namespace = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(namespace, "svg");
  drawing.setAttribute("viewBox", "0 0 20 20");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(namespace, "path");
  path.setAttribute("d", "M5 5l10 10M15 5L5 15");
  drawing.append(path);
  return drawing;
}
