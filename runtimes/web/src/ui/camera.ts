/** A photo: through the camera where pages may use it, else through the phone's own camera program. */
import { AppError } from "../errors";
import { element } from "./dom";

export function listenForCamera(picture: (file: Blob) => void, failed: (error: unknown) => void): void {
  const dialog = element("viewfinder", HTMLDialogElement);
  const video = element("video", HTMLVideoElement);
  const close = (): void => dialog.close();

  dialog.addEventListener("close", () => {
    const stream = video.srcObject;
    if (stream instanceof MediaStream) for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  });
  element("cancel", HTMLButtonElement).addEventListener("click", close);
  element("camera", HTMLButtonElement).addEventListener("click", async () => {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch (error) {
      const refused = refusal(error);
      if (refused) failed(refused);
      else element("capture", HTMLInputElement).click();
    }
  });
  element("shoot", HTMLButtonElement).addEventListener("click", () => {
    if (!video.videoWidth) return; // no frame has come yet
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d")?.drawImage(video, 0, 0);
    canvas.toBlob((blob) => blob && picture(blob), "image/png");
    close();
  });
}

/** What to tell where there is a camera that this page may not use; undefined where another way is left. */
function refusal(error: unknown): AppError | undefined {
  const name = error instanceof DOMException ? error.name : "";
  if (name === "NotAllowedError") {
    return new AppError("the camera was not allowed", "allow it for this page in the browser, or choose a picture file");
  }
  if (name === "NotReadableError") {
    return new AppError("the camera gives no picture", "close other programs that use it, or choose a picture file");
  }
  return undefined;
}
