package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"blksnap/store"
)

// rollBack rolls the first device back.
func (r *rig) rollBack(s *Snapshot) {
	r.t.Helper()
	if err := image(r.t, s, "d0").Rollback(); err != nil {
		r.t.Fatal(err)
	}
	if r.devs[0].RollingBack() != nil {
		r.t.Fatal("a rollback is pending after it succeeded")
	}
}

// TestRollback rolls back to each of three images in turn, with all of them there.
func TestRollback(t *testing.T) {
	const size = 3<<20 + 512
	for _, tc := range []struct {
		name string
		// what changes the device after the k-th snapshot, in the model as well
		change func(t *testing.T, d *Device, live []byte, k int)
	}{
		{"everything", func(t *testing.T, d *Device, live []byte, k int) {
			put(t, d, byte(10+k), 0, size)
			fill(live, byte(10+k), 0, size)
		}},
		{"blocks here and there", func(t *testing.T, d *Device, live []byte, k int) {
			for off := int64(k) * 4096; off < size-4096; off += 40960 {
				put(t, d, byte(10+k), off+100, 5)
				fill(live, byte(10+k), off+100, 5)
			}
		}},
		{"the last sector", func(t *testing.T, d *Device, live []byte, k int) {
			put(t, d, byte(10+k), size-512, 512)
			fill(live, byte(10+k), size-512, 512)
		}},
		{"zeroes and back", func(t *testing.T, d *Device, live []byte, k int) {
			if k == 1 {
				put(t, d, 9, 1<<20, 1<<20)
				fill(live, 9, 1<<20, 1<<20)
				return
			}
			if err := d.WriteZeroes(1<<20, 1<<20, zeroFlags{}); err != nil {
				t.Fatal(err)
			}
			fill(live, 0, 1<<20, 1<<20)
		}},
		{"nothing", func(*testing.T, *Device, []byte, int) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 64<<20)
			d := r.devs[0]
			live := bytes.Repeat([]byte{1}, size)
			put(t, d, 1, 0, size)
			var snaps []*Snapshot
			var held [][]byte
			for k := range 3 {
				snaps, held = append(snaps, r.takeWritable(fmt.Sprint(k))), append(held, slices.Clone(live))
				tc.change(t, d, live, k)
			}
			// What was written to an image does not count.
			put(t, image(t, snaps[1], "d0"), 99, 5000, 100<<10)
			for _, k := range []int{1, 0, 2, 0} {
				number := image(t, snaps[2], "d0").Changes().Number()
				r.rollBack(snaps[k])
				wantBytes(t, fmt.Sprintf("the device, rolled back to %d", k), d, held[k])
				for j, s := range snaps {
					if j == 1 {
						want(t, image(t, s, "d0"), 99, 5000, 100<<10)
						continue
					}
					wantBytes(t, fmt.Sprintf("image %d after a rollback to %d", j, k), image(t, s, "d0"), held[j])
				}
				// The next increment to the newest snapshot has what was written back.
				runs, ok := d.Changes().Since(number)
				if !ok {
					t.Fatal("a rollback has ended the generation")
				}
				copied := slices.Clone(held[2])
				applyRuns(t, copied, held[k], runs)
				if at := firstDiff(copied, held[k]); at >= 0 {
					t.Fatalf("after a rollback to %d the increment misses byte %d", k, at)
				}
				if err := Check(r.pool, d); err != nil {
					t.Fatal(err)
				}
			}
			put(t, d, 50, 0, 4096) // goes on
			want(t, d, 50, 0, 4096)
		})
	}
}

// TestRollbackBringsHolesBack fills a hole and rolls back.
func TestRollbackBringsHolesBack(t *testing.T) {
	const block = blockSize
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 16*block)
	s := r.take("s")
	put(t, d, 2, 8*block, 100*block)
	r.rollBack(s)
	// Chunk 0 was copied whole; what is a hole again are the chunks that were.
	wantList(t, "the device", list(t, d.Runs(0, 1<<20)), "0+16 data", "16+240 zero")
	want(t, d, 1, 0, 16*block)
}

// TestRollbackWritesInFewPieces rolls back what is contiguous.
func TestRollbackWritesInFewPieces(t *testing.T) {
	r := newRig(t, 1, 8<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 8<<20)
	s := r.take("s")
	put(t, d, 2, 1<<20, 4<<20)
	var mu sync.Mutex
	writes := 0
	r.disks[0].hook(func(op string, _, _ int64) error {
		mu.Lock()
		defer mu.Unlock()
		if op == "write" {
			writes++
		}
		return nil
	})
	r.rollBack(s)
	if writes > 5 {
		t.Errorf("4 MiB were written back in %d writes", writes)
	}
	want(t, d, 1, 0, 8<<20)
}

// TestRollbackReserves rolls back with too little room for what newer images need:
// nothing has changed. With enough it is just enough.
func TestRollbackReserves(t *testing.T) {
	const size, overwritten = 8 << 20, 1 << 20
	for _, tc := range []struct {
		name string
		room int64
		want error
	}{
		{"no room", 0, store.ErrFull},
		{"one block too little", overwritten - blockSize, store.ErrFull},
		{"just enough", overwritten, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 4<<20)
			other := r.addDevice("other", size, Config{})
			d := r.devs[0]
			put(t, d, 1, 0, size)
			put(t, other, 1, 0, size)
			old := r.take("old", d)
			put(t, d, 2, 0, overwritten) // in the layer of old
			newer := r.take("newer", d)
			filler := r.take("filler", other)
			for off := int64(0); r.pool.Room() > tc.room; off += blockSize {
				put(t, other, 2, off, blockSize)
			}
			_, before, _ := r.pool.Space()
			writes := 0
			r.parts[0].hook(func(op string, _, _ int64) error {
				if op == "write" {
					writes++
				}
				return nil
			})
			err := image(t, old, "d0").Rollback()
			if !errors.Is(err, tc.want) {
				t.Fatalf("rollback: got %v, want %v", err, tc.want)
			}
			v := byte(1)
			if tc.want != nil {
				v = 2
				if _, after, _ := r.pool.Space(); after != before || writes > 0 {
					t.Errorf("a rollback that failed wrote %d times and took the space in use from %d to %d", writes, before, after)
				}
			}
			want(t, d, v, 0, overwritten)
			if got := states(old, newer, filler); got != "ok ok ok" {
				t.Errorf("states: got %s, want ok ok ok", got)
			}
			want(t, image(t, newer, "d0"), 2, 0, overwritten)
			want(t, image(t, old, "d0"), 1, 0, size)
			put(t, d, 3, 0, 512) // not pending
		})
	}
}

// TestRollbackOfHolesNeedsNoRoom rolls back in a full snapstore what the newer image
// has as holes.
func TestRollbackOfHolesNeedsNoRoom(t *testing.T) {
	const size = 1 << 20
	r := newRig(t, 1, size, 4<<20)
	other := r.addDevice("other", 8<<20, Config{})
	d := r.devs[0]
	put(t, d, 1, 0, size)
	put(t, other, 1, 0, 8<<20)
	old := r.take("old", d)
	if err := d.WriteZeroes(0, size, zeroFlags{}); err != nil {
		t.Fatal(err)
	}
	newer := r.take("newer", d)
	r.take("filler", other)
	for off := int64(0); r.pool.Room() > 0; off += blockSize {
		put(t, other, 2, off, blockSize)
	}
	if err := image(t, old, "d0").Rollback(); err != nil {
		t.Fatal(err)
	}
	want(t, d, 1, 0, size)
	want(t, image(t, newer, "d0"), 0, 0, size)
}

// TestRollbackThatCannotPreserve has the snapstore fail in the middle of what is
// preserved for the rollback: all is as it was.
func TestRollbackThatCannotPreserve(t *testing.T) {
	const size = 1 << 20
	for k := 1; ; k++ {
		r := newRig(t, 1, size, 16<<20)
		d := r.devs[0]
		put(t, d, 1, 0, size)
		old := r.take("old")
		put(t, d, 2, 0, size)
		newer := r.take("newer")
		// Parts of the chunks are in the head already, some whole, one as a hole.
		put(t, d, 2, 4096, 8192)
		put(t, d, 2, 64<<10, 64<<10)
		before := r.used()
		n := 0
		r.parts[0].hook(func(op string, _, _ int64) error {
			if op == "write" {
				if n++; n >= k {
					return errIO
				}
			}
			return nil
		})
		err := image(t, old, "d0").Rollback()
		r.parts[0].hook(nil)
		if err == nil {
			if k == 1 {
				t.Fatal("nothing was preserved for the newer image")
			}
			want(t, d, 1, 0, size)
			t.Logf("failed at each of %d writes to the snapstore", k-1)
			return
		}
		if !errors.Is(err, syscall.EIO) && !errors.Is(err, store.ErrFull) {
			t.Errorf("write %d: got %v, want EIO or ErrFull", k, err)
		}
		if got := r.used(); got != before {
			t.Errorf("write %d: space in use went from %d to %d", k, before, got)
		}
		if got := states(old, newer); got != "ok ok" {
			t.Errorf("write %d: states: got %s, want ok ok", k, got)
		}
		want(t, d, 2, 0, size)
		want(t, image(t, old, "d0"), 1, 0, size)
		put(t, d, 3, 0, size)
		if newer.State() == "ok" { // the part may have failed for good
			want(t, image(t, newer, "d0"), 2, 0, size)
		}
		if t.Failed() {
			return
		}
	}
}

// TestFailedRollbackWaitsForReaders has a rollback fail when it has preserved some,
// while a reader is at the snapstore. What goes back must be back when the next write
// is let in: that preserves the same blocks.
func TestFailedRollbackWaitsForReaders(t *testing.T) {
	const size, block = 3 << 20, int64(blockSize)
	r := newRig(t, 1, size, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, size)
	old := image(t, r.take("old"), "d0")
	put(t, d, 2, 0, size)
	newer := image(t, r.takeLimited("newer", 300), "d0")
	put(t, d, 3, 0, block)
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.parts[0].hook(func(op string, _, _ int64) error {
		if op == "read" {
			once.Do(func() {
				close(entered)
				<-release
			})
		}
		return nil
	})
	read := begin(func() error { return newer.Read(make([]byte, 1), 0) })
	<-entered
	rollback := begin(old.Rollback)
	stillWaits(t, rollback, "a rollback that fails under a reader")
	close(release)
	if err := <-read; err != nil {
		t.Error(err)
	}
	if err := <-rollback; !errors.Is(err, store.ErrFull) {
		t.Errorf("the rollback: got %v, want ErrFull", err)
	}
	put(t, d, 4, 0, 300*block)
	put(t, d, 5, 0, 300*block)
	if err := Check(r.pool, d); err != nil {
		t.Error(err)
	}
	want(t, newer, 2, 0, size)
	want(t, old, 1, 0, size)
}

// TestRollbackKeepsOthersOut holds a rollback in the middle and tries everything
// else.
func TestRollbackKeepsOthersOut(t *testing.T) {
	const size = 4 << 20
	r := newRig(t, 1, size, 32<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, size)
	s := r.takeWritable("s")
	i := image(t, s, "d0")
	put(t, d, 2, 0, size)
	newer := r.take("newer")
	entered, release := stop(k.hook, "write", 0)
	rollback := begin(i.Rollback)
	<-entered

	p := make([]byte, 4096)
	for what, tc := range map[string]struct{ got, want error }{
		"write":           {d.Write(p, size-4096, false), ErrRollback},
		"try to write":    {d.TryWrite(p, size-4096, nil), syscall.EAGAIN},
		"zero":            {d.WriteZeroes(size-4096, 4096, zeroFlags{}), ErrRollback},
		"trim":            {d.Trim(size-4096, 4096, false), ErrRollback},
		"resize":          {d.Resize(), ErrRollback},
		"shrink":          {d.Shrink(512), ErrRollback},
		"destroy":         {s.Destroy(false), ErrRollback},
		"destroy, forced": {s.Destroy(true), ErrRollback},
		"rollback":        {i.Rollback(), ErrRollback},
		"another":         {image(t, newer, "d0").Rollback(), ErrRollback},
		"read":            {d.Read(p, size-4096), nil},
		"read the image":  {i.Read(p, 0), nil},
		"write to it":     {i.Write(p, 0, false), nil},
		"mark":            {d.Mark(0, 1), nil},
		"flush":           {d.Flush(), nil},
	} {
		if !errors.Is(tc.got, tc.want) {
			t.Errorf("%s during a rollback: got %v, want %v", what, tc.got, tc.want)
		}
		if tc.want == ErrRollback && !errors.Is(tc.got, syscall.EBUSY) {
			t.Errorf("%s during a rollback: %v is not EBUSY", what, tc.got)
		}
	}
	if _, err := r.cat.Take("other", r.devs, TakeOptions{}); !errors.Is(err, ErrRollback) {
		t.Errorf("take during a rollback: got %v, want ErrRollback", err)
	}
	if d.RollingBack() != i {
		t.Error("the rollback is not pending")
	}
	destroyed := begin(func() error { return newer.Destroy(false) })
	<-image(t, newer, "d0").Gone()
	close(release)
	if err := errors.Join(<-rollback, <-destroyed); err != nil {
		t.Fatal(err)
	}
	want(t, d, 1, 0, size)
	put(t, d, 3, 0, 4096)
	r.destroy(s)
}

// TestRollbackWaitsForWrites has writes in flight when a rollback begins.
func TestRollbackWaitsForWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1, 1<<20, 16<<20)
		d, k := r.devs[0], r.disks[0]
		put(t, d, 1, 0, 1<<20)
		i := image(t, r.take("s"), "d0")
		entered, release := stop(k.hook, "write", 0)
		write := begin(func() error { return d.Write([]byte{2}, 0, false) })
		<-entered
		if err := i.Rollback(); !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("rollback with a write in the origin: got %v, want ETIMEDOUT", err)
		}
		put(t, d, 2, 8192, 1) // goes on
		rollback := begin(i.Rollback)
		waitsOn(t, rollback, "rolling back with a write in the origin")
		close(release)
		ends(t, write, "the write")
		ends(t, rollback, "the rollback")
		want(t, d, 1, 0, 1<<20)
		r.close()
		r.devs, r.pool, r.cat = nil, store.NewPool(), newCatalogue(t, "", "")
	})
}

// TestWriteThatWaitedForSpace waits outside the gate for space when a rollback
// begins: it must not be applied afterwards.
func TestWriteThatWaitedForSpace(t *testing.T) {
	r := newEmptyRig(t)
	r.addPart(1 << 20)
	d := r.addDevice("d0", 4<<20, Config{StoreWait: time.Minute})
	put(t, d, 1, 0, 4<<20)
	s := r.take("s")
	write := begin(func() error { return d.Write(bytes.Repeat([]byte{2}, 2<<20), 1<<20, false) })
	stillWaits(t, write, "a write that finds no room in the store")
	entered, release := stop(r.disks[0].hook, "write", 1<<20)
	rollback := begin(image(t, s, "d0").Rollback)
	<-entered
	r.addPart(8 << 20) // now there is room
	if err := <-write; !errors.Is(err, ErrRollback) {
		t.Errorf("the write: got %v, want ErrRollback", err)
	}
	close(release)
	if err := <-rollback; err != nil {
		t.Fatal(err)
	}
	want(t, d, 1, 0, 4<<20)
}

// TestRollbackEnds ends a rollback in the middle, by what is fatal to it.
func TestRollbackEnds(t *testing.T) {
	const size = 4 << 20
	for _, tc := range []struct {
		name string
		op   string // of the origin that it is held in
		end  func(r *rig, i *Image) error
		want error
		v    byte // of the first byte of the device afterwards
	}{
		{"the origin fails", "write", func(*rig, *Image) error { return errIO }, syscall.EIO, 2},
		{"the flush fails", "sync", func(*rig, *Image) error { return errIO }, syscall.EIO, 1},
		{"the image is lost", "write", func(_ *rig, i *Image) error {
			i.device.breakImage(i, failed("test"), errIO)
			return nil
		}, ErrFailed, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 16<<20)
			d, k := r.devs[0], r.disks[0]
			put(t, d, 1, 0, size)
			i := image(t, r.take("s"), "d0")
			put(t, d, 2, 0, size)
			k.hook(func(op string, off, _ int64) error {
				if op == tc.op && off == 0 {
					return tc.end(r, i)
				}
				return nil
			})
			if err := i.Rollback(); !errors.Is(err, tc.want) {
				t.Errorf("rollback: got %v, want %v", err, tc.want)
			}
			k.hook(nil)
			if d.RollingBack() != nil {
				t.Error("a rollback is pending that cannot go on")
			}
			want(t, d, tc.v, 0, 1)
			put(t, d, 3, size-4096, 4096)
			if i.Err() == nil && tc.op == "write" { // again
				if err := i.Rollback(); err != nil {
					t.Error(err)
				}
				want(t, d, 1, 0, size)
			}
		})
	}
}

func TestRollbackRefuses(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	large := r.take("large")
	if err := d.Shrink(512 << 10); err != nil {
		t.Fatal(err)
	}
	if err := image(t, large, "d0").Rollback(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("rollback of a smaller device: got %v, want EINVAL", err)
	}
	gone := r.take("gone")
	r.destroy(gone)
	if err := image(t, gone, "d0").Rollback(); !errors.Is(err, ErrDestroyed) {
		t.Errorf("rollback to a destroyed image: got %v, want ErrDestroyed", err)
	}
	// A larger device keeps what the image does not have.
	small := r.take("small")
	r.resize(0, 1<<20)
	put(t, d, 3, 0, 1<<20)
	r.rollBack(small)
	want(t, d, 1, 0, 512<<10)
	want(t, d, 3, 512<<10, 512<<10)
	// So does one that is as large as the image again.
	r.rollBack(large)
	want(t, d, 1, 0, 1<<20)
}

// TestRollbackModel rolls back at random between writes, snapshots, their ends and
// writes to images, and compares everything with plain byte slices.
func TestRollbackModel(t *testing.T) {
	rng := newRand(t)
	for range 12 {
		rollbackModel(t, rand.New(rand.NewPCG(rng.Uint64(), 0)))
		if t.Failed() {
			return
		}
	}
}

func rollbackModel(t *testing.T, r *rand.Rand) {
	const size = 40*blockSize + 512
	live := make([]byte, size)
	rig := newRig(t, 1, size, 16<<20)
	d := rig.devs[0]
	type snap struct {
		*sizedSnap
		held []byte // without what was written to the image
	}
	var snaps []snap
	for op := range 60 {
		off := r.Int64N(size)
		n := 1 + r.Int64N(size-off)
		v := byte(1 + r.IntN(255))
		switch r.IntN(8) {
		case 0, 1:
			put(t, d, v, off, n)
			fill(live, v, off, n)
		case 2:
			if err := d.WriteZeroes(off, n, zeroFlags{}); err != nil {
				t.Fatal(err)
			}
			fill(live, 0, off, n)
		case 3:
			s := rig.takeWritable(fmt.Sprint(op))
			snaps = append(snaps, snap{&sizedSnap{s: s, image: slices.Clone(live)}, slices.Clone(live)})
		case 4:
			if n := len(snaps); n > 0 {
				k := r.IntN(n)
				rig.destroy(snaps[k].s)
				snaps = slices.Delete(snaps, k, k+1)
			}
		case 5:
			if len(snaps) > 0 {
				s := snaps[r.IntN(len(snaps))]
				put(t, image(t, s.s, "d0"), v, off, n)
				fill(s.image, v, off, n)
			}
		case 6, 7:
			if len(snaps) > 0 {
				s := snaps[r.IntN(len(snaps))]
				rig.rollBack(s.s)
				copy(live, s.held)
			}
		}
		var sized []*sizedSnap
		for _, s := range snaps {
			sized = append(sized, s.sizedSnap)
		}
		verifySizes(t, rig, live, sized)
	}
	rig.close()
	rig.devs, rig.pool, rig.cat = nil, store.NewPool(), newCatalogue(t, "", "")
}
