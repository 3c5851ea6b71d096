/** A photo: through the camera where pages may use it, else through the phone's own camera program. */
import { element } from "./dom";

export function listenForCamera(picture: (file: Blob) => void): void {
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
    } catch {
      element("capture", HTMLInputElement).click();
    }
  });
  element("shoot", HTMLButtonElement).addEventListener("click", () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d")?.drawImage(video, 0, 0);
    canvas.toBlob((blob) => blob && picture(blob), "image/png");
    close();
  });
}
