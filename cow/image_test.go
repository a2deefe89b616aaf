package cow

import (
	"bytes"
	"errors"
	"syscall"
	"testing"
)

// put writes n bytes of value v to a device or an image.
func put(t *testing.T, d interface {
	Write([]byte, int64, bool) error
}, v byte, off, n int64) {
	t.Helper()
	if err := d.Write(bytes.Repeat([]byte{v}, int(n)), off, false); err != nil {
		t.Fatal(err)
	}
}

// want checks that all n bytes at off are v.
func want(t *testing.T, r interface{ Read([]byte, int64) error }, v byte, off, n int64) {
	t.Helper()
	p := make([]byte, n)
	if err := r.Read(p, off); err != nil {
		t.Fatalf("read at %d: %v", off, err)
	}
	for i, got := range p {
		if got != v {
			t.Fatalf("byte %d: got %d, want %d", off+int64(i), got, v)
		}
	}
}

func image(t *testing.T, s *Snapshot, device string) *Image {
	t.Helper()
	i, ok := s.Image(device)
	if !ok {
		t.Fatalf("snapshot %s has no image of %s", s.Name(), device)
	}
	return i
}

func TestImageKeepsWhatWasThere(t *testing.T) {
	const size = 3<<20 + 512
	for _, tc := range []struct {
		name   string
		off, n int64
	}{
		{"one block", 4096, 4096},
		{"less than a block", 5000, 10},
		{"across blocks", 4000, 200},
		{"across chunks", 65000, 2000},
		{"several windows", 1000, 2<<20 + 77},
		{"the last sector", size - 512, 512},
		{"everything", 0, size},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 64<<20)
			d := r.devs[0]
			put(t, d, 1, 0, size)
			s1 := r.take("one")
			put(t, d, 2, tc.off, tc.n)
			s2 := r.take("two")
			put(t, d, 3, tc.off, tc.n)
			want(t, image(t, s1, "d0"), 1, 0, size)
			want(t, image(t, s2, "d0"), 2, tc.off, tc.n)
			want(t, image(t, s2, "d0"), 1, 0, tc.off)
			want(t, image(t, s2, "d0"), 1, tc.off+tc.n, size-tc.off-tc.n)
			want(t, d, 3, tc.off, tc.n)
		})
	}
}

func TestDestroyInEveryOrder(t *testing.T) {
	const size = 1 << 20
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		r := newRig(t, 1, size, 64<<20)
		d := r.devs[0]
		put(t, d, 1, 0, size)
		var snaps []*Snapshot
		for k := range byte(3) {
			snaps = append(snaps, r.take(string('a'+rune(k))))
			// Parts of the chunks overlap, so that folding has to join slots.
			put(t, d, 10+k, int64(k)*4096, size/2)
			put(t, d, 20+k, 512<<10, 8192*(int64(k)+1))
		}
		check := func() {
			t.Helper()
			for k, s := range snaps {
				if s == nil {
					continue
				}
				got, wanted := make([]byte, size), bytes.Repeat([]byte{1}, size)
				for j := range byte(k) {
					copy(wanted[int64(j)*4096:], bytes.Repeat([]byte{10 + j}, size/2))
					copy(wanted[512<<10:], bytes.Repeat([]byte{20 + j}, int(8192*(int64(j)+1))))
				}
				if err := image(t, s, "d0").Read(got, 0); err != nil {
					t.Fatal(err)
				}
				for i := range got {
					if got[i] != wanted[i] {
						t.Fatalf("order %v: image %d, byte %d: got %d, want %d", order, k, i, got[i], wanted[i])
					}
				}
			}
			if err := Check(r.pool, r.devs...); err != nil {
				t.Fatalf("order %v: %v", order, err)
			}
		}
		check()
		for _, k := range order {
			r.destroy(snaps[k])
			snaps[k] = nil
			check()
		}
		if _, used, _ := r.pool.Space(); used != 0 {
			t.Errorf("order %v: %d bytes in use after all snapshots were destroyed", order, used)
		}
	}
}

func TestDestroyedImage(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	s := r.take("one")
	i := image(t, s, "d0")
	if err := i.Acquire(); err != nil {
		t.Fatal(err)
	}
	if err := s.Destroy(false); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("destroy while in use: got %v, want EBUSY", err)
	}
	if err := s.Destroy(true); err != nil {
		t.Errorf("destroy by force: %v", err)
	}
	if err := i.Read(make([]byte, 10), 0); !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("read of a destroyed image: got %v, want ESHUTDOWN", err)
	}
	if err := i.Acquire(); !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("acquire a destroyed image: got %v, want ESHUTDOWN", err)
	}
	select {
	case <-i.Gone():
	default:
		t.Error("the image is not gone")
	}
	if err := s.Destroy(true); !errors.Is(err, ErrDestroyed) {
		t.Errorf("destroy twice: got %v, want ErrDestroyed", err)
	}
	i.Release()
}
