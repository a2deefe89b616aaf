package cow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// registerHome has snapshots 0 to 3 of a device of zeroes that had 1 to 4 written over
// its first blocks since. What block k of image n holds is in was.
func registerHome(t *testing.T) (h *home, was [4][]byte) {
	t.Helper()
	const size = 1 << 20
	h = newHome(t, size)
	h.open()
	for n := range was {
		was[n] = make([]byte, size)
		if err := h.dev.Read(was[n], 0); err != nil {
			t.Fatal(err)
		}
		h.take(string(rune('0' + n)))
		put(t, h.dev, byte(n+1), int64(n)*chunkSize, size-int64(n)*chunkSize)
	}
	h.close()
	return h, was
}

func (h *home) layer(name string) string {
	return filepath.Join(h.dir, "run", "devices", "vda", name)
}

// TestLostLayer does something to layer 1, or to what the device knows of its layers,
// while nobody looks. The images up to it are lost, say why, and stay so; the newer ones
// read what they did; the device and its generation go on.
func TestLostLayer(t *testing.T) {
	clear := func(path string, n int) error {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(make([]byte, n), 0)
		return errors.Join(err, f.Close())
	}
	for _, tc := range []struct {
		name  string
		spoil func(h *home) error
		lost  int    // images from 0 on
		want  string // in their states
	}{
		{"nothing", func(*home) error { return nil }, 0, ""},
		{"removed", func(h *home) error { return os.Remove(h.layer("layer-1")) }, 2, "layer 1, which it needs, is lost: no such file"},
		{"emptied", func(h *home) error { return os.Truncate(h.layer("layer-1"), 0) }, 2, "layer 1, which it needs, is lost: its file was emptied"},
		{"without a header", func(h *home) error { return clear(h.layer("layer-1"), 4096) }, 2, "layer 1, which it needs, is lost: its file was emptied"},
		{"cut short", func(h *home) error { return os.Truncate(h.layer("layer-1"), 5000) }, 2, "layer 1, which it needs, is lost: damaged state"},
		{"another word", func(h *home) error { return poke(h.layer("layer-1"), tableHeader+10*8+3, 4) }, 2, "layer 1, which it needs, is lost: damaged state: word of chunk 10"},
		{"a word in another place", func(h *home) error {
			f, err := os.OpenFile(h.layer("layer-1"), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			var b [8]byte
			_, err = f.ReadAt(b[:], tableHeader+9*8)
			if err == nil {
				_, err = f.WriteAt(b[:], tableHeader+10*8)
			}
			return errors.Join(err, f.Close())
		}, 2, "damaged state: word of chunk 10"},
		{"another one", func(h *home) error {
			b, err := os.ReadFile(h.layer("layer-2"))
			if err != nil {
				return err
			}
			host.PutUint64(b[16:], 1)
			putMagic(b, layerMagic, layerVersion, layerConstant)
			return os.WriteFile(h.layer("layer-1"), b, 0o600)
		}, 2, "layer 1, which it needs, is lost: damaged state: it was replaced by another file"},
		{"a directory", func(h *home) error {
			return errors.Join(os.Remove(h.layer("layer-1")), os.Mkdir(h.layer("layer-1"), 0o700))
		}, 2, "layer 1, which it needs, is lost: "},
		{"the first", func(h *home) error { return os.Remove(h.layer("layer-0")) }, 1, "layer 0, which it needs, is lost"},
		{"the last", func(h *home) error { return os.Remove(h.layer("layer-3")) }, 4, "layer 3, which it needs, is lost"},
		{"two", func(h *home) error {
			return errors.Join(os.Remove(h.layer("layer-0")), os.Truncate(h.layer("layer-2"), 0))
		}, 3, "layer 2, which it needs, is lost"},
		{"a stranger", func(h *home) error {
			b, err := os.ReadFile(h.layer("layer-3"))
			if err != nil {
				return err
			}
			host.PutUint64(b[16:], 4)
			putMagic(b, layerMagic, layerVersion, layerConstant)
			return os.WriteFile(h.layer("layer-4"), b, 0o600)
		}, 0, ""},
		{"no register", func(h *home) error { return os.Remove(h.layer(registerName)) }, 4, "the register of its layers is lost: it is not there"},
		{"an empty register", func(h *home) error { return os.Truncate(h.layer(registerName), 0) }, 4, "the register of its layers is lost: "},
		{"a damaged register", func(h *home) error { return poke(h.layer(registerName), entryBytes+entryConst, 1) }, 4, "the register of its layers is lost: damaged state"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, was := registerHome(t)
			if err := tc.spoil(h); err != nil {
				t.Fatal(err)
			}
			var told []string
			h.notify = func(e Event) {
				if e.Kind == EventSnapshotFailed {
					told = append(told, e.Snapshot)
				}
			}
			var generation string
			for again := range 3 {
				snaps := h.open()
				if c := h.dev.Changes().Generation(); again > 0 && c != generation {
					t.Errorf("start %d: another generation", again)
				} else {
					generation = c
				}
				for n := range was {
					s := snaps[string(rune('0'+n))]
					if s == nil {
						t.Fatalf("start %d: snapshot %d is gone", again, n)
					}
					i, ok := s.Image("vda")
					if !ok && again > 0 && n < tc.lost && strings.HasPrefix(s.State(), "failed: ") {
						continue // its layer is nobody's any more
					}
					if !ok {
						t.Fatalf("start %d: image %d is gone", again, n)
					}
					if lost := i.Err() != nil; lost != (n < tc.lost) || !strings.Contains(i.State(), tc.want) && lost {
						t.Errorf("start %d: image %d is %q\nwant lost %v, %q", again, n, i.State(), n < tc.lost, tc.want)
					}
					if n >= tc.lost {
						wantBytes(t, "image "+s.Name(), i, was[n])
					}
				}
				if err := Check(h.pool, h.dev); err != nil {
					t.Error(err)
				}
				h.close()
			}
			slices.Sort(told)
			if len(told) != tc.lost || len(slices.Compact(told)) != tc.lost {
				t.Errorf("events of %v, want the first %d once", told, tc.lost)
			}
		})
	}
}

// TestRegisterKeepsUp takes and destroys snapshots: the register has the layers that are
// there, and no others, also when it has to grow.
func TestRegisterKeepsUp(t *testing.T) {
	h := newHome(t, 1<<20)
	h.open()
	var snaps []*Snapshot
	for n := range 600 {
		s, err := h.cat.Take(string(rune('a'+n%26))+time.Now().Format("150405.000000000"), []*Device{h.dev}, TakeOptions{Limit: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		snaps = append(snaps, s)
	}
	for _, s := range snaps[:590] {
		if err := s.Destroy(false); err != nil {
			t.Fatal(err)
		}
	}
	list, err := h.dev.register.list()
	if err != nil || len(list) != 10 || list[0].number != 590 {
		t.Errorf("got %v, %v, want the last 10", list, err)
	}
	h.close()
	if got := len(h.open()); got != 10 {
		t.Errorf("%d snapshots after a start, want 10", got)
	}
	h.close()
}

// TestRegisterFormat guards the bytes of an entry and of the header.
func TestRegisterFormat(t *testing.T) {
	h := newHome(t, 1<<20)
	h.open()
	h.take("one")
	e, err := h.dev.register.list()
	if err != nil || len(e) != 1 {
		t.Fatalf("got %v, %v", e, err)
	}
	h.close()
	b, err := os.ReadFile(h.layer(registerName))
	if err != nil {
		t.Fatal(err)
	}
	var want [entryBytes]byte
	le := host
	le.PutUint64(want[0:], 1)
	le.PutUint64(want[8:], e[0].cbt)
	le.PutUint64(want[24:], 1<<20)
	le.PutUint64(want[32:], 1)
	le.PutUint64(want[56:], e[0].random)
	copy(want[64:68], b[entryBytes+64:]) // its checksum
	if got := b[entryBytes : 2*entryBytes]; !bytes.Equal(got, want[:]) || e[0].random == 0 || e[0].cbt == 0 {
		t.Errorf("entry\n got %x\nwant %x", got, want)
	}
	if string(b[:8]) != "blksnapI" || b[8] != 1 {
		t.Errorf("header %x", b[:16])
	}
}

// TestChangesCutShort cuts the change map short, somewhere in its marks, while nobody
// looks. What was marked there is not forgotten in silence: a new generation begins.
func TestChangesCutShort(t *testing.T) {
	const size = 1 << 30
	for _, lost := range []int64{1, 100, 4096} {
		h := newHome(t, size)
		h.open()
		for off := int64(0); off < size; off += 64 << 10 {
			if err := h.dev.Mark(off, 1); err != nil {
				t.Fatal(err)
			}
		}
		was := h.dev.Changes()
		h.close()
		path := h.layer("changes")
		st, err := os.Stat(path)
		if err == nil {
			err = os.Truncate(path, st.Size()-lost)
		}
		if err != nil {
			t.Fatal(err)
		}
		h.open()
		if h.dev.Changes().Generation() == was.Generation() {
			t.Errorf("cut by %d bytes: the generation goes on", lost)
		}
		h.close()
	}
}
