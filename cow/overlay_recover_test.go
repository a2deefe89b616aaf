package cow

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestOverlayOverRestart closes a device with a writable image, does something to
// what it left, and opens it again.
func TestOverlayOverRestart(t *testing.T) {
	const size = 1 << 20
	file := func(h *home, name string) string {
		return filepath.Join(h.dir, "run", "devices", "vda", name)
	}
	for _, tc := range []struct {
		name  string
		spoil func(h *home) error
		want  string // state of the image, up to the first space
	}{
		{"nothing happens", func(*home) error { return nil }, "ok"},
		{"no overlay", func(h *home) error { return os.Remove(file(h, "overlay-1")) }, "failed:"},
		{"overlay without magic", func(h *home) error { return poke(file(h, "overlay-1"), 0, 1) }, "failed:"},
		{"overlay with another number", func(h *home) error { return poke(file(h, "overlay-1"), 16, 1) }, "failed:"},
		{"damaged table", func(h *home) error { return poke(file(h, "overlay-1"), tableHeader+3, 0xff) }, "failed:"},
		{"snapstore lost", func(h *home) error { return os.Remove(filepath.Join(h.dir, "store")) }, "failed:"},
		{"an overlay of nobody", func(h *home) error {
			return os.Link(file(h, "overlay-1"), file(h, "overlay-9"))
		}, "ok"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHome(t, size)
			h.open()
			put(t, h.dev, 1, 0, size)
			h.take("plain")
			s, err := h.cat.Take("s", []*Device{h.dev}, TakeOptions{Limit: time.Minute, Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			i := image(t, s, "vda")
			put(t, i, 2, 100, 200<<10)
			if err := i.Zero(64<<10, 64<<10); err != nil {
				t.Fatal(err)
			}
			h.close()
			if err := tc.spoil(h); err != nil {
				t.Fatal(err)
			}

			snaps := h.open()
			want(t, h.dev, 1, 0, size)
			want(t, image(t, snaps["plain"], "vda"), 1, 0, size)
			i = image(t, snaps["s"], "vda")
			if got, _, _ := strings.Cut(i.State(), " "); got != tc.want {
				t.Errorf("state: got %q, want %q", i.State(), tc.want)
			}
			if tc.want == "ok" {
				want(t, i, 1, 0, 100)
				want(t, i, 2, 100, 64<<10-100)
				want(t, i, 0, 64<<10, 64<<10)
				want(t, i, 2, 128<<10, 72<<10+100)
				want(t, i, 1, 200<<10+100, size-200<<10-100)
				put(t, i, 3, 150, 100<<10)
				want(t, i, 3, 150, 100<<10)
			} else if err := i.Write([]byte{1}, 0, false); !errors.Is(err, syscall.EIO) {
				t.Errorf("write to an image that lost what was written: got %v, want EIO", err)
			}
			if err := Check(h.pool, h.dev); err != nil {
				t.Error(err)
			}
			for _, name := range []string{"overlay-1", "overlay-9"} {
				_, err := os.Stat(file(h, name))
				if there := err == nil; there != (tc.want == "ok" && name == "overlay-1") {
					t.Errorf("%s: %v", name, err)
				}
			}
			h.close()
		})
	}
}

// poke changes a byte of a file.
func poke(path string, off int64, xor byte) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		return err
	}
	b[0] ^= xor
	_, err = f.WriteAt(b[:], off)
	return err
}
