package cow

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// states are the states of the snapshots, joined.
func states(snaps ...*Snapshot) string {
	var s []string
	for _, n := range snaps {
		st, _, _ := strings.Cut(n.State(), ":")
		s = append(s, st)
	}
	return strings.Join(s, " ")
}

func TestOverflowBreaksExactlyThoseThatNeedTheBlock(t *testing.T) {
	const block = int64(blockSize)
	for _, tc := range []struct {
		name  string
		setup func(t *testing.T, d *Device, take func(string))
		write int64 // block that cannot be preserved
		want  string
	}{
		{"nobody holds it: all break", func(t *testing.T, d *Device, take func(string)) {
			take("a")
			take("b")
			take("c")
		}, 0, "overflowed overflowed overflowed"},
		{"the oldest holds it: only newer ones break", func(t *testing.T, d *Device, take func(string)) {
			take("a")
			put(t, d, 2, 0, block)
			take("b")
			take("c")
		}, 0, "ok overflowed overflowed"},
		{"the middle one holds it: the newest breaks", func(t *testing.T, d *Device, take func(string)) {
			take("a")
			take("b")
			put(t, d, 2, 0, block)
			take("c")
		}, 0, "ok ok overflowed"},
		{"one block of the write is held, one is not", func(t *testing.T, d *Device, take func(string)) {
			take("a")
			take("b")
			put(t, d, 2, 0, block)
			take("c")
		}, 1, "overflowed overflowed overflowed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 4<<20, 8<<20)
			d, p := r.devs[0], r.parts[0]
			put(t, d, 1, 0, 4<<20)
			var snaps []*Snapshot
			tc.setup(t, d, func(name string) { snaps = append(snaps, r.take(name)) })
			before := make([][]byte, len(snaps))
			for k, s := range snaps {
				before[k] = make([]byte, d.Size())
				if err := image(t, s, "d0").Read(before[k], 0); err != nil {
					t.Fatal(err)
				}
			}
			p.hook(func(op string, off, n int64) error {
				if op == "write" {
					return syscall.ENOSPC
				}
				return nil
			})
			put(t, d, 9, 0, (tc.write+1)*block)
			p.hook(nil)
			if got := states(snaps...); got != tc.want {
				t.Errorf("states\n got %s\nwant %s", got, tc.want)
			}
			want(t, d, 9, 0, (tc.write+1)*block)
			for k, s := range snaps {
				if s.State() != "ok" {
					continue
				}
				got := make([]byte, d.Size())
				if err := image(t, s, "d0").Read(got, 0); err != nil || string(got) != string(before[k]) {
					t.Errorf("healthy image %s has changed (%v)", s.Name(), err)
				}
			}
			// The device can be snapshotted again.
			s := r.take("again")
			put(t, d, 10, 8<<10, 4096)
			if s.State() == "ok" {
				want(t, image(t, s, "d0"), 9, 0, (tc.write+1)*block)
			}
			for _, s := range append(snaps, s) {
				r.destroy(s)
			}
		})
	}
}

func TestOverflowGivesSpaceBack(t *testing.T) {
	r := newRig(t, 1, 8<<20, 2<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 8<<20)
	s := r.take("s")
	put(t, d, 2, 0, 8<<20)
	if got := states(s); got != "overflowed" {
		t.Fatalf("state: got %s, want overflowed", got)
	}
	if !d.settle(time.Minute) {
		t.Fatal("nothing is given back")
	}
	if _, used, _ := r.pool.Space(); used != 0 {
		t.Errorf("%d bytes in use though no healthy snapshot is left", used)
	}
	// It holds what fits, again.
	s2 := r.take("s2")
	put(t, d, 3, 0, 1<<20)
	want(t, image(t, s2, "d0"), 2, 0, 8<<20)
}

func TestFailingPartIsLeftForTheNext(t *testing.T) {
	r := newRig(t, 1, 4<<20, 16<<20)
	r.addPart(16 << 20)
	d := r.devs[0]
	put(t, d, 1, 0, 4<<20)
	s := r.take("s")
	r.parts[0].hook(func(op string, off, n int64) error { return errIO })
	put(t, d, 2, 0, 2<<20)
	want(t, image(t, s, "d0"), 1, 0, 4<<20)
	if got := states(s); got != "ok" {
		t.Errorf("state: got %s, want ok", got)
	}
}

func TestFailingSlotBreaksWhoReadsIt(t *testing.T) {
	r := newRig(t, 1, 4<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 4<<20)
	s1 := r.take("s1")
	put(t, d, 2, 0, 4096)
	s2 := r.take("s2")
	r.parts[0].hook(func(op string, off, n int64) error { return errIO })
	if err := image(t, s1, "d0").Read(make([]byte, 4096), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read through a slot that fails: got %v, want EIO", err)
	}
	r.parts[0].hook(nil)
	if got, wanted := states(s1, s2), "failed ok"; got != wanted {
		t.Errorf("states: got %s, want %s", got, wanted)
	}
	want(t, image(t, s2, "d0"), 2, 0, 4096)
}

// TestFaultAtEveryOperation fails the k-th operation of a scenario on the
// snapstore, for every k: the origin is always right, and an image is right or
// says that it is lost.
func TestFaultAtEveryOperation(t *testing.T) {
	for _, fault := range []error{syscall.EIO, syscall.ENOSPC} {
		for k := 1; ; k++ {
			if !faultAt(t, k, fault) {
				t.Logf("%v at each of %d operations", fault, k-1)
				break
			}
			if t.Failed() {
				t.Fatalf("%v at operation %d", fault, k)
			}
		}
	}
}

// faultAt says whether there was a k-th operation.
func faultAt(t *testing.T, k int, fault error) bool {
	r := newRig(t, 1, 1<<20, 8<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	var mu sync.Mutex
	n := 0
	r.parts[0].hook(func(op string, off, _ int64) error {
		mu.Lock()
		defer mu.Unlock()
		if n++; n == k {
			return fmt.Errorf("injected: %w", fault)
		}
		return nil
	})
	var snaps []*Snapshot
	steps := []func(){
		func() { put(t, d, 2, 0, 70000) },
		func() { put(t, d, 3, 4096, 4096) },
		func() { put(t, d, 4, 0, 1<<20) },
	}
	for _, step := range steps {
		snaps = append(snaps, r.take(fmt.Sprintf("s%d", len(snaps))))
		step()
	}
	r.destroy(snaps[1]) // folds
	wants := [][]byte{make([]byte, 1<<20), nil, make([]byte, 1<<20)}
	for i := range wants[0] {
		wants[0][i], wants[2][i] = 1, 1
		if i < 70000 {
			wants[2][i] = 2
		}
		if i >= 4096 && i < 8192 {
			wants[2][i] = 3
		}
	}
	for _, j := range []int{0, 2} {
		got := make([]byte, 1<<20)
		err := image(t, snaps[j], "d0").Read(got, 0)
		if err == nil && string(got) != string(wants[j]) {
			t.Errorf("fault at operation %d: image %d has other bytes", k, j)
		}
		if err != nil && snaps[j].State() == "ok" {
			t.Errorf("fault at operation %d: image %d says %v and that it is ok", k, j, err)
		}
	}
	want(t, d, 4, 0, 1<<20)
	r.parts[0].hook(nil)
	return n >= k
}

func TestStoreWait(t *testing.T) {
	for _, tc := range []struct {
		name string
		wait time.Duration
		free bool
		want string
	}{
		{"space comes in time", time.Minute, true, "ok"},
		{"no space comes", 20 * time.Millisecond, false, "overflowed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newEmptyRig(t)
			r.addPart(1 << 20)
			d := r.addDevice("d0", 4<<20, Config{StoreWait: tc.wait})
			put(t, d, 1, 0, 4<<20)
			s := r.take("s")
			write := begin(func() error { return d.Write(make([]byte, 2<<20), 0, false) })
			if tc.free {
				stillWaits(t, write, "a write that finds no room in the store")
				s2 := r.take("s2") // not held up by the write that waits
				want(t, d, 1, 3<<20, 1<<20)
				r.addPart(8 << 20)
				defer r.destroy(s2)
			}
			if err := <-write; err != nil {
				t.Fatal(err)
			}
			if got := states(s); got != tc.want {
				t.Errorf("state: got %s, want %s", got, tc.want)
			}
			want(t, d, 0, 0, 2<<20)
		})
	}
}
