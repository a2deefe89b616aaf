package cow

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"

	"blksnap/store"
)

// takeLimited takes a snapshot that may need a number of blocks.
func (r *rig) takeLimited(name string, blocks int64, devs ...*Device) *Snapshot {
	r.t.Helper()
	return r.takeWith(TakeOptions{MaxStore: blocks * blockSize}, name, devs...)
}

// TestLimit writes as many blocks as a snapshot may need, again and again, and then
// one more.
func TestLimit(t *testing.T) {
	const block = int64(blockSize)
	for _, n := range []int64{1, 5, 16, 40} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, 1<<20)
			s := r.takeWith(TakeOptions{MaxStore: n*block + block - 1}, "s")
			if got := s.MaxStore(); got != n*block {
				t.Errorf("limit: got %d, want %d", got, n*block)
			}
			put(t, d, 2, 3*block, n*block)
			put(t, d, 3, 3*block+512, n*block-512)
			put(t, d, 4, 3*block+7, 1)
			if got := s.State(); got != "ok" {
				t.Fatalf("state with as much as it may need: %s", got)
			}
			want(t, image(t, s, "d0"), 1, 0, 1<<20)
			if got := r.used(); got != n*block {
				t.Errorf("%d bytes are in use, want %d", got, n*block)
			}
			put(t, d, 5, 3*block-1, 2) // one block that is preserved and one that is not
			if got := s.State(); got != "overflowed" || !r.event(EventSnapshotOverflowed, "s") {
				t.Errorf("state with one block more: got %s, want overflowed, and an event", got)
			}
			if got := r.used(); got != 0 {
				t.Errorf("%d bytes are in use for a snapshot that is lost", got)
			}
			want(t, d, 5, 3*block-1, 2)
			again := r.takeLimited("again", n)
			put(t, d, 6, 0, block)
			if got := again.State(); got != "ok" {
				t.Errorf("state of the next snapshot: %s", got)
			}
		})
	}
}

func TestLimitRefuses(t *testing.T) {
	r := newRig(t, 1, 1<<20, 1<<20)
	for _, n := range []int64{-1, 1, blockSize - 1} {
		if _, err := r.cat.Take("s", r.devs, TakeOptions{MaxStore: n}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("a limit of %d bytes: got %v, want EINVAL", n, err)
		}
	}
}

// TestLimitAmongOthers limits some of three snapshots, which need 8, 6 and 4 blocks at
// the end, and share them. Exactly those break that need more than they may.
func TestLimitAmongOthers(t *testing.T) {
	const block = int64(blockSize)
	for _, tc := range []struct {
		old, mid, last int64 // limits; 0: none
		want           string
		used           int64 // blocks
	}{
		{8, 6, 4, "ok ok ok", 12},
		{0, 0, 0, "ok ok ok", 12},
		{7, 6, 4, "overflowed ok ok", 8},
		{8, 5, 4, "ok overflowed ok", 10},
		{8, 6, 3, "ok ok overflowed", 10},
		{7, 5, 3, "overflowed overflowed overflowed", 0},
		{1, 0, 4, "overflowed ok ok", 8},
		{7, 0, 3, "overflowed ok overflowed", 6},
	} {
		t.Run(fmt.Sprint(tc.old, tc.mid, tc.last), func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			d := r.devs[0]
			var snaps []*Snapshot
			var held [][]byte
			live := make([]byte, 1<<20)
			write := func(v byte, from, to int64) { // block by block
				for b := from; b < to; b++ {
					put(t, d, v, b*block, block)
					fill(live, v, b*block, block)
				}
			}
			take := func(name string, most int64) {
				snaps, held = append(snaps, r.takeLimited(name, most)), append(held, bytes.Clone(live))
			}
			write(1, 0, 16)
			take("old", tc.old)
			write(2, 0, 4)
			take("mid", tc.mid)
			write(3, 2, 6)
			take("last", tc.last)
			write(4, 4, 8)
			if got := states(snaps...); got != tc.want {
				t.Errorf("states: got %s, want %s", got, tc.want)
			}
			for k, s := range snaps {
				if s.State() == "ok" {
					wantBytes(t, s.Name(), image(t, s, "d0"), held[k])
				}
			}
			if got := r.used(); got != tc.used*block {
				t.Errorf("%d blocks are in use, want %d", got/block, tc.used)
			}
		})
	}
}

// TestLimitOfSeveralDevices has images of two devices share a limit. What one had goes
// to the other when it is lost.
func TestLimitOfSeveralDevices(t *testing.T) {
	const block = int64(blockSize)
	r := newRig(t, 2, 1<<20, 16<<20)
	for _, d := range r.devs {
		put(t, d, 1, 0, 1<<20)
	}
	s := r.takeLimited("s", 5)
	a, b := image(t, s, "d0"), image(t, s, "d1")
	put(t, r.devs[0], 2, 0, 2*block)
	put(t, r.devs[1], 2, 0, 3*block)
	if got := s.State(); got != "ok" {
		t.Fatalf("state with as much as it may need: %s", got)
	}
	put(t, r.devs[1], 2, 8*block, block)
	if a.State() != "ok" || b.State() != "overflowed" {
		t.Errorf("states: got %s and %s, want ok and overflowed", a.State(), b.State())
	}
	put(t, r.devs[0], 2, 2*block, 3*block)
	want(t, a, 1, 0, 1<<20)
	put(t, r.devs[0], 2, 8*block, 1)
	if got := a.State(); got != "overflowed" {
		t.Errorf("state of the other image with one block more: got %s, want overflowed", got)
	}
}

// TestLimitAndHoles preserves a hole, which takes nothing, and folds it into a slot,
// where it takes 15 blocks.
func TestLimitAndHoles(t *testing.T) {
	const block = int64(blockSize)
	for _, tc := range []struct {
		name      string
		old, last int64
		want      string
	}{
		{"just enough", 16, 1, "ok ok"},
		{"one block too little", 15, 1, "overflowed ok"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, block)
			old := r.takeLimited("old", tc.old)
			put(t, d, 2, 0, block)
			if err := d.Trim(0, block, false); err != nil {
				t.Fatal(err)
			}
			between := r.takeLimited("between", 1)
			put(t, d, 3, 3*block, block) // of a chunk that is a hole
			put(t, d, 3, chunkSize, 3*chunkSize)
			last := r.takeLimited("last", tc.last)
			if got := states(old, between, last); got != "ok ok ok" {
				t.Fatalf("states before: got %s, want ok ok ok", got)
			}
			r.destroy(between)
			if got := states(old, last); got != tc.want {
				t.Errorf("states: got %s, want %s", got, tc.want)
			}
			if old.State() == "ok" {
				want(t, image(t, old, "d0"), 1, 0, block)
				want(t, image(t, old, "d0"), 0, block, 1<<20-block)
			}
		})
	}
}

// TestLimitOfWhatIsWritten writes to an image: what is too much finds no space, and
// nothing is lost.
func TestLimitOfWhatIsWritten(t *testing.T) {
	const block = int64(blockSize)
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	s := r.takeWith(TakeOptions{MaxStore: 20 * block, Writable: true}, "s")
	i := image(t, s, "d0")
	put(t, d, 2, 0, 2*block)
	put(t, i, 3, 4*block, 18*block)
	put(t, i, 3, 4*block, 18*block)
	if err := i.Write(make([]byte, 2*block), 21*block, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("one block more: got %v, want ENOSPC", err)
	}
	if got := s.State(); got != "ok" {
		t.Fatalf("state: %s", got)
	}
	want(t, i, 1, 0, 4*block)
	want(t, i, 3, 4*block, 18*block)
	want(t, i, 1, 22*block, 4*block)
	if err := i.Zero(0, chunkSize); err != nil { // gives 12 blocks back
		t.Fatal(err)
	}
	put(t, i, 4, 32*block, 12*block)
	if err := i.Write([]byte{5}, 44*block, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("one block more again: got %v, want ENOSPC", err)
	}
	if err := i.Write([]byte{5}, 0, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a chunk of zeroes that needs 16 blocks: got %v, want ENOSPC", err)
	}
	if err := i.Zero(32*block, chunkSize); err != nil { // 12
		t.Fatal(err)
	}
	r.parts[0].hook(func(op string, _, _ int64) error {
		if op == "write" {
			return errIO
		}
		return nil
	})
	if err := i.Write([]byte{5}, 48*block, false); err == nil {
		t.Error("a write to a part that fails succeeded")
	}
	r.parts[0].hook(nil)
	if err := Check(r.pool, d); err != nil { // counts
		t.Error(err)
	}
	r.addPart(16 << 20)
	put(t, i, 6, 48*block, 12*block)
	put(t, d, 7, 8*block, block) // one too many
	if got := s.State(); got != "overflowed" {
		t.Errorf("state: got %s, want overflowed", got)
	}
}

// TestLimitOverRestart goes on counting where the predecessor stopped.
func TestLimitOverRestart(t *testing.T) {
	const block = int64(blockSize)
	h := newHome(t, 1<<20)
	h.open()
	put(t, h.dev, 1, 0, 1<<20)
	s, err := h.cat.Take("s", []*Device{h.dev}, TakeOptions{MaxStore: 6 * block, Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	h.take("unlimited")
	put(t, h.dev, 2, 14*block, 3*block)
	put(t, image(t, s, "vda"), 2, 0, 2*block)
	for range 2 {
		h.close()
		s = h.open()["s"]
		if got := s.MaxStore(); got != 6*block {
			t.Errorf("limit: got %d, want %d", got, 6*block)
		}
		if err := Check(h.pool, h.dev); err != nil {
			t.Error(err)
		}
	}
	put(t, h.dev, 3, 15*block, 3*block)
	if got := s.State(); got != "ok" {
		t.Errorf("state with as much as it may need: %s", got)
	}
	put(t, h.dev, 3, 40*block, 1)
	if got := s.State(); got != "overflowed" {
		t.Errorf("state with one block more: got %s, want overflowed", got)
	}
	h.close()
	h.open()
	put(t, h.dev, 4, 50*block, 1) // nobody counts for it any more
	h.close()
}

// TestLimitUnderLoad has many writers at once overwrite together as much as a snapshot
// may need, or one block more.
func TestLimitUnderLoad(t *testing.T) {
	const block, writers, each = int64(blockSize), 8, 100
	for _, tc := range []struct {
		most int64
		want string
	}{{writers * each, "ok ok"}, {writers*each - 1, "overflowed ok"}} {
		r := newRig(t, 1, 8<<20, 16<<20)
		d := r.devs[0]
		put(t, d, 1, 0, 8<<20)
		s := r.takeLimited("s", tc.most)
		other := r.take("other")
		var wg sync.WaitGroup
		for w := range int64(writers) {
			wg.Go(func() {
				for k := range int64(each) {
					// Neighbours belong to different writers.
					if err := d.Write([]byte{2}, (k*writers+w)*block, false); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if got := states(s, other); got != tc.want {
			t.Errorf("states with a limit of %d blocks: got %s, want %s", tc.most, got, tc.want)
		}
	}
}

// TestLimitSparesImages shrinks and rolls back where a limit is in the way: nothing is
// lost for it, and nothing has changed.
func TestLimitSparesImages(t *testing.T) {
	const size, block = 1 << 20, int64(blockSize)
	r := newRig(t, 1, size, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, size)
	old := r.take("old")
	put(t, d, 2, 0, 100*block)
	limited := r.takeLimited("limited", 99)
	before := r.used()
	for what, err := range map[string]error{
		"rollback": image(t, old, "d0").Rollback(),
		"shrink":   d.Shrink(size - 100*block),
	} {
		if !errors.Is(err, store.ErrFull) || !strings.Contains(err.Error(), "limited is limited to 405504 bytes") {
			t.Errorf("%s: got %v, want ErrFull, and the limit", what, err)
		}
	}
	if got := states(old, limited); got != "ok ok" {
		t.Errorf("states: got %s, want ok ok", got)
	}
	want(t, d, 2, 0, 100*block)
	if err := Check(r.pool, d); err != nil {
		t.Error(err)
	}
	if got := r.used(); got < before {
		t.Errorf("%d bytes are in use, %d before", got, before)
	}
	if err := image(t, limited, "d0").Rollback(); err != nil { // needs nothing
		t.Error(err)
	}
}
