package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"blksnap/store"
)

// resize lets somebody else change the origin's size and the device follow.
func (r *rig) resize(dev int, size int64) {
	r.t.Helper()
	r.disks[dev].resize(size)
	if err := r.devs[dev].Resize(); err != nil {
		r.t.Fatal(err)
	}
	if got := r.devs[dev].Size(); got != size {
		r.t.Fatalf("size after a resize: got %d, want %d", got, size)
	}
}

func TestGrow(t *testing.T) {
	for _, tc := range []struct{ was, size int64 }{
		{64 << 10, 128 << 10},
		{64<<10 + 512, 64<<10 + 1024},
		{60<<10 + 512, 3<<20 + 512},
		{4096, 8 << 20}, // the older layers' tables have fewer levels
		{512, 1 << 20},
	} {
		t.Run(fmt.Sprintf("from %d to %d", tc.was, tc.size), func(t *testing.T) {
			r := newRig(t, 1, tc.was, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, tc.was)
			before := image(t, r.take("before"), "d0")
			r.resize(0, tc.size)
			runs, ok := d.Changes().Since(before.Changes().Number())
			if !ok {
				t.Fatal("growing has ended the generation")
			}
			from, to := tc.size, int64(0)
			for r := range runs {
				from, to = min(from, r.Off), r.Off+r.N
			}
			if wanted := tc.was &^ (64<<10 - 1); from != wanted || to != tc.size {
				t.Errorf("changed by growing: from %d to %d, want %d to %d", from, to, wanted, tc.size)
			}

			put(t, d, 2, tc.was, tc.size-tc.was)
			if _, used, _ := r.pool.Space(); used > blockSize {
				t.Errorf("%d bytes were preserved of what no image has", used)
			}
			after := r.take("after")
			put(t, d, 3, 0, tc.size)
			if before.Size() != tc.was || image(t, after, "d0").Size() != tc.size {
				t.Errorf("images are of %d and %d bytes, want %d and %d", before.Size(), image(t, after, "d0").Size(), tc.was, tc.size)
			}
			want(t, before, 1, 0, tc.was)
			want(t, image(t, after, "d0"), 1, 0, tc.was)
			want(t, image(t, after, "d0"), 2, tc.was, tc.size-tc.was)
			if err := Check(r.pool, d); err != nil {
				t.Error(err)
			}
			r.destroy(after) // what only it has goes from a head that the older image reads
			if err := Check(r.pool, d); err != nil {
				t.Error(err)
			}
			want(t, before, 1, 0, tc.was)
		})
	}
}

// TestFoldIntoSmallerImage folds a layer of the larger device into that of an image
// from before it grew: what is beyond that image's end goes back.
func TestFoldIntoSmallerImage(t *testing.T) {
	const was, size = 9*blockSize + 512, 40 * blockSize
	for _, tc := range []struct {
		name string
		own  bool // the small image's layer has a block of the chunk
	}{
		{"slot moves", false},
		{"slots are joined", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, was, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, was)
			small := image(t, r.take("small"), "d0")
			if tc.own {
				put(t, d, 2, 0, blockSize)
			}
			r.resize(0, size)
			put(t, d, 2, 10*blockSize, size-10*blockSize)
			between := r.take("between")
			put(t, d, 3, 0, size)
			last := image(t, r.take("last"), "d0")
			put(t, d, 4, 0, size)
			r.destroy(between)
			want(t, small, 1, 0, was)
			want(t, last, 3, 0, size)
			if err := Check(r.pool, d); err != nil {
				t.Error(err)
			}
			if got := small.Holds(); got != 10*blockSize {
				t.Errorf("the small image holds %d bytes, want %d", got, 10*blockSize)
			}
			if got := last.Holds(); got != size {
				t.Errorf("the last image holds %d bytes, want %d", got, size)
			}
		})
	}
}

// TestFoldIntoCutSlot folds two layers at once into that of an image from before the
// device grew. The first word loses its blocks beyond the image's end on the way, the
// second makes it move to another slot: both come back in the same round.
func TestFoldIntoCutSlot(t *testing.T) {
	const was, block = 9*blockSize + 512, int64(blockSize)
	r := newRig(t, 1, was, 1<<20)
	r.addPart(1 << 20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, was)
	small := image(t, r.take("small"), "d0")
	r.resize(0, 2*chunkSize)
	put(t, d, 1, chunkSize, 2*block)
	a := r.take("a")
	put(t, d, 2, 2*block, block)
	put(t, d, 2, 11*block, block)
	b := r.take("b")
	put(t, d, 3, 3*block, block)
	r.take("last")
	r.parts[0].hook(func(op string, _, _ int64) error {
		if op == "write" {
			return errIO
		}
		return nil
	})
	put(t, d, 4, chunkSize, block) // by which the part fails
	entered, release := stop(k.hook, "write", chunkSize+block)
	write := begin(func() error { return d.Write([]byte{5}, chunkSize+block, false) })
	<-entered
	var ended []chan error
	for _, s := range []*Snapshot{a, b} {
		ended = append(ended, begin(func() error { return s.Destroy(false) }))
		<-image(t, s, "d0").Gone()
	}
	close(release)
	for _, e := range append(ended, write) {
		if err := <-e; err != nil {
			t.Error(err)
		}
	}
	want(t, small, 1, 0, was)
	if err := Check(r.pool, d); err != nil {
		t.Error(err)
	}
}

// TestOverflowBeyondAnImage cannot preserve a block that only the newer of two
// images has: the older one does not break.
func TestOverflowBeyondAnImage(t *testing.T) {
	const was, size = 64 << 10, 256 << 10
	r := newRig(t, 1, was, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, was)
	small := r.take("small")
	r.resize(0, size)
	put(t, d, 1, was, size-was)
	large := r.take("large")
	r.parts[0].hook(func(op string, _, _ int64) error {
		if op == "write" {
			return syscall.ENOSPC
		}
		return nil
	})
	put(t, d, 2, was, 4096)
	r.parts[0].hook(nil)
	if got, wanted := states(small, large), "ok overflowed"; got != wanted {
		t.Errorf("states: got %s, want %s", got, wanted)
	}
	want(t, image(t, small, "d0"), 1, 0, was)
}

// TestCutBehindOurBack cuts an origin short: of the images, exactly those break that
// need a block of what is gone.
func TestCutBehindOurBack(t *testing.T) {
	const block, size = blockSize, 48*blockSize + 512
	for _, tc := range []struct {
		name  string
		write [2]int64 // blocks that were overwritten after the snapshot
		to    int64
		want  string
	}{
		{"all but what was written to the image is preserved", [2]int64{0, 20}, 16 * block, "failed"},
		{"all is preserved", [2]int64{0, 49}, 16 * block, "ok"},
		{"exactly what is cut is preserved", [2]int64{16, 49}, 16 * block, "ok"},
		{"one block before the cut is not", [2]int64{17, 49}, 16 * block, "failed"},
		{"one in the middle is not", [2]int64{16, 20}, 16 * block, "failed"},
		{"the last sector is not", [2]int64{0, 48}, 16 * block, "failed"},
		{"nothing is", [2]int64{}, 16 * block, "failed"},
		{"cut in a block that is preserved", [2]int64{15, 49}, 16*block - 512, "ok"},
		{"cut in a block that is not", [2]int64{16, 49}, 16*block - 512, "failed"},
		{"only the last sector is cut", [2]int64{48, 49}, 48 * block, "ok"},
		{"only the last sector is cut, and needed", [2]int64{0, 48}, 48 * block, "failed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, size)
			s := r.takeWritable("s")
			i := image(t, s, "d0")
			// An overlay is no help: the image can be rolled back.
			put(t, i, 7, 20*block, block)
			if tc.write[1] == 20 {
				put(t, d, 2, 21*block, size-21*block)
			}
			for b := tc.write[0]; b < tc.write[1]; b++ {
				put(t, d, 2, b*block, min(block, size-b*block))
			}
			newer := r.take("newer") // needs everything
			r.resize(0, tc.to)
			if got := states(s); got != tc.want {
				t.Errorf("state: got %q, want %s", s.State(), tc.want)
			}
			if got := states(newer); got != "failed" || !r.event(EventSnapshotFailed, "newer") {
				t.Errorf("state of an image that needs what was cut: got %q, want failed, and an event", got)
			}
			put(t, d, 3, 0, tc.to)
			if tc.want == "ok" {
				want(t, i, 1, 0, 20*block)
				want(t, i, 7, 20*block, block)
				want(t, i, 1, 21*block, size-21*block)
			}
			// What grows again is not what it was.
			r.resize(0, size)
			put(t, d, 4, 0, size)
			if tc.want == "ok" {
				want(t, i, 1, 21*block, size-21*block)
			}
			again := r.take("again")
			put(t, d, 5, 0, size)
			want(t, image(t, again, "d0"), 4, 0, size)
		})
	}
}

// TestWriteToBlockThatWasCut writes what is left of a block, an image of which needs
// all, as soon as that is possible: what is preserved then is not what the image
// needs, and must not be taken for it.
func TestWriteToBlockThatWasCut(t *testing.T) {
	const size, to = 2 * blockSize, blockSize + 512
	r := newRig(t, 1, size, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, size)
	a, b := r.take("a"), r.take("b")
	written := make(chan error, 1)
	r.notify = func(e Event) {
		if e.Snapshot == "a" {
			go func() { written <- d.Write([]byte{2}, blockSize, false) }()
			stillWaits(t, written, "a write to a block that was cut")
		}
	}
	r.resize(0, to)
	if err := <-written; err != nil {
		t.Error(err)
	}
	if got := states(a, b); got != "failed failed" {
		t.Errorf("states: got %s, want failed failed", got)
	}
}

// TestDestroyDuringResize destroys a snapshot, and has everything that it held given
// back, just before the device asks whether it needs what was cut.
func TestDestroyDuringResize(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	r.take("a")
	b := r.take("b")
	r.notify = func(e Event) {
		if e.Snapshot == "a" {
			r.destroy(b)
		}
	}
	r.resize(0, 512<<10)
	if got := r.used(); got != 0 {
		t.Errorf("%d bytes are in use", got)
	}
}

// TestReadOfWhatWasCut reads from an image what was cut from the origin, before that
// has broken the image.
func TestReadOfWhatWasCut(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	put(t, r.devs[0], 1, 0, 1<<20)
	r.take("a")
	b := image(t, r.take("b"), "d0")
	var err error
	r.notify = func(e Event) {
		if e.Snapshot == "a" {
			err = b.Read(make([]byte, 4096), 512<<10)
		}
	}
	r.resize(0, 512<<10)
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v, want EIO", err)
	}
}

// TestClientsOfALargerDevice reads and writes what was cut off, as clients do that
// connected before.
func TestClientsOfALargerDevice(t *testing.T) {
	const was, size = 1 << 20, 512<<10 + 512
	r := newRig(t, 1, was, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, was)
	image := image(t, r.take("s"), "d0")
	if err := d.Shrink(size); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{size - 511, size, was - 512, 1<<63 - 512} {
		p := make([]byte, 512)
		for what, tc := range map[string]struct{ got, want error }{
			"read":         {d.Read(p, off), syscall.EINVAL},
			"try to read":  {d.TryRead(p, off), syscall.EAGAIN},
			"write":        {d.Write(p, off, false), syscall.ENOSPC},
			"try to write": {d.TryWrite(p, off, nil), syscall.EAGAIN},
			"zero":         {d.WriteZeroes(off, 512, zeroFlags{}), syscall.ENOSPC},
			"trim":         {d.Trim(off, 512, false), syscall.ENOSPC},
			"mark":         {d.Mark(off, 512), syscall.EINVAL},
			"find holes":   {runsError(d, off, 512), syscall.EINVAL},
		} {
			if !errors.Is(tc.got, tc.want) {
				t.Errorf("%s at %d: got %v, want %v", what, off, tc.got, tc.want)
			}
		}
	}
	if n, err := image.Allocated(); n != was || err != nil {
		t.Errorf("data of an image of the larger device: got %d bytes, %v, want %d", n, err, was)
	}
	if now, _ := r.disks[0].size(); now != size || d.State() != "ok" {
		t.Errorf("the origin has %d bytes and the device is %s, want %d and ok", now, d.State(), size)
	}
	want(t, d, 1, 0, size)
	want(t, image, 1, 0, was)
}

// runsError is the error that ends the runs of a range.
func runsError(d *Device, off, n int64) (err error) {
	for _, e := range d.Runs(off, n) {
		err = e
	}
	return err
}

// TestFindHolesDuringShrink looks for the holes of an image while its device is cut.
func TestFindHolesDuringShrink(t *testing.T) {
	const was, size = 1 << 20, 512 << 10
	r := newRig(t, 1, was, 16<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 256<<10, 128<<10)
	i := image(t, r.take("s"), "d0")
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	k.hook(func(op string, off, n int64) error {
		if op == "next" && off == 384<<10 && n > chunkSize { // what follows the data
			once.Do(func() {
				close(entered)
				<-release
			})
		}
		return nil
	})
	var n int64
	found := begin(func() (err error) { n, err = i.Allocated(); return err })
	<-entered
	if err := d.Shrink(size); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := <-found; err != nil || n != 128<<10 {
		t.Errorf("data of the image: got %d bytes, %v, want %d", n, err, 128<<10)
	}
	if got := d.State(); got != "ok" {
		t.Errorf("the device is %s", got)
	}
	wantList(t, "the image", list(t, i.Runs(0, was)), "0+64 zero", "64+32 data", "96+160 zero")
}

func TestShrink(t *testing.T) {
	const was = 1<<20 + 512
	for _, size := range []int64{512 << 10, 512<<10 + 512, 512<<10 - 512, 512, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r := newRig(t, 1, was, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, was)
			a := r.take("a")
			put(t, d, 2, 300<<10, 400<<10)
			b := r.take("b")
			if err := d.Shrink(size); err != nil {
				t.Fatal(err)
			}
			if now, _ := r.disks[0].size(); now != size || d.Size() != size {
				t.Errorf("origin and device have %d and %d bytes, want %d", now, d.Size(), size)
			}
			c := image(t, r.take("c"), "d0")
			check := func() {
				t.Helper()
				want(t, image(t, a, "d0"), 1, 0, was)
				want(t, image(t, b, "d0"), 1, 0, 300<<10)
				want(t, image(t, b, "d0"), 2, 300<<10, 400<<10)
				want(t, image(t, b, "d0"), 1, 700<<10, was-700<<10)
				if err := Check(r.pool, d); err != nil {
					t.Error(err)
				}
			}
			check()
			put(t, d, 3, 0, size)
			r.resize(0, was)
			put(t, d, 4, 0, was)
			check()
			want(t, c, 1, 0, min(size, 300<<10))
			if c.Size() != size {
				t.Errorf("the image taken in between has %d bytes, want %d", c.Size(), size)
			}
			if r.used() == 0 {
				t.Error("nothing is preserved")
			}
		})
	}
}

func TestShrinkThatFails(t *testing.T) {
	const size = 4 << 20
	for _, tc := range []struct {
		name  string
		to    int64
		limit int64
		spoil func(r *rig)
		want  error
	}{
		{"no room", 1 << 20, 1 << 20, func(*rig) {}, store.ErrFull},
		{"no part works", 1 << 20, 16 << 20, func(r *rig) {
			r.parts[0].hook(func(op string, _, _ int64) error { return errIO })
		}, store.ErrFull},
		{"the origin cannot be cut", 1 << 20, 16 << 20, func(r *rig) {
			r.disks[0].hook(func(op string, _, _ int64) error {
				if op == "truncate" {
					return syscall.EINVAL // as of a block device
				}
				return nil
			})
		}, syscall.EINVAL},
		{"to nothing", 0, 16 << 20, func(*rig) {}, syscall.EINVAL},
		{"to less", -512, 16 << 20, func(*rig) {}, syscall.EINVAL},
		{"to parts of a sector", 1000, 16 << 20, func(*rig) {}, syscall.EINVAL},
		{"to more", size + 512, 16 << 20, func(*rig) {}, syscall.EINVAL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, tc.limit)
			d := r.devs[0]
			put(t, d, 1, 0, size)
			s := r.take("s")
			tc.spoil(r)
			if err := d.Shrink(tc.to); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			r.parts[0].hook(nil)
			r.disks[0].hook(nil)
			if now, _ := r.disks[0].size(); now != size || d.Size() != size {
				t.Errorf("origin and device have %d and %d bytes, want %d", now, d.Size(), size)
			}
			if got := states(s); got != "ok" {
				t.Errorf("state: got %s, want ok", got)
			}
			want(t, d, 1, 0, size)
			want(t, image(t, s, "d0"), 1, 0, size)
		})
	}
}

func TestResizeRefuses(t *testing.T) {
	r := newRig(t, 1, 1<<20, 1<<20)
	d, k := r.devs[0], r.disks[0]
	for _, size := range []int64{0, 1000} {
		k.resize(size)
		if err := d.Resize(); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("resize to %d bytes: got %v, want EINVAL", size, err)
		}
	}
	k.resize(1 << 20)
	if err := d.Resize(); err != nil {
		t.Errorf("resize to what it is: %v", err)
	}
	if got := d.Size(); got != 1<<20 {
		t.Errorf("size: got %d, want %d", got, 1<<20)
	}
	closed := r.addDevice("closed", 1<<20, Config{})
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"resize": closed.Resize(), "shrink": closed.Shrink(512)} {
		if !errors.Is(err, ErrStopping) {
			t.Errorf("%s of a closed device: got %v, want ErrStopping", what, err)
		}
	}
	r.devs = r.devs[:1]
}

// TestResizeWaitsForWrites holds a write in the origin: the size does not change
// before it has ended, and not at all if it takes too long.
func TestResizeWaitsForWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const was, size = 1 << 20, 512 << 10
		for _, to := range []int64{size, 2 << 20} {
			r := newRig(t, 1, was, 16<<20)
			d, k := r.devs[0], r.disks[0]
			put(t, d, 1, 0, was)
			entered, release := stop(k.hook, "write", was-4096)
			write := begin(func() error { return d.Write(make([]byte, 4096), was-4096, false) })
			<-entered
			k.resize(to)
			if err := d.Resize(); !errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("resize with a write in the origin: got %v, want ETIMEDOUT", err)
			}
			if d.Size() != was || d.Changes().view.Size() != was {
				t.Errorf("after a resize that failed: device and map of %d and %d bytes, want %d", d.Size(), d.Changes().view.Size(), was)
			}
			resize := begin(d.Resize)
			waitsOn(t, resize, "resizing with a write in the origin")
			close(release)
			ends(t, write, "the write")
			err := <-resize
			if to > was && (err != nil || d.Size() != to) {
				t.Errorf("resize: got %v and %d bytes, want %d", err, d.Size(), to)
			}
			// The write has made the origin as long as it was.
			if to < was && (!errors.Is(err, syscall.EBUSY) || d.Size() != was) {
				t.Errorf("resize: got %v and %d bytes, want EBUSY and %d", err, d.Size(), was)
			}
			r.close()
			r.devs, r.pool, r.cat = nil, store.NewPool(), newCatalogue(t, "", "")
		}
	})
}

// TestShrinkWaitsForReader holds a reader of an image that found its blocks in the
// origin: they are not cut under it.
func TestShrinkWaitsForReader(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, 1<<20)
	i := image(t, r.take("s"), "d0")
	entered, release := stop(k.hook, "read", 1<<20-4096)
	got := make([]byte, 4096)
	read := begin(func() error { return i.Read(got, 1<<20-4096) })
	<-entered
	shrink := begin(func() error { return d.Shrink(512 << 10) })
	stillWaits(t, shrink, "cutting what a reader is reading")
	put(t, d, 2, 0, 4096) // goes on
	close(release)
	if err := errors.Join(<-read, <-shrink); err != nil {
		t.Fatal(err)
	}
	if got[0] != 1 {
		t.Errorf("the reader: got %d, want 1", got[0])
	}
}

// TestTakeWaitsForShrink takes a snapshot while the tail is being preserved.
func TestTakeWaitsForShrink(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	i := image(t, r.take("s"), "d0")
	entered, release := stop(r.parts[0].hook, "write", 0)
	shrink := begin(func() error { return d.Shrink(512 << 10) })
	<-entered
	var s *Snapshot
	take := begin(func() (err error) { s, err = r.cat.Take("newer", r.devs, TakeOptions{}); return err })
	stillWaits(t, take, "a snapshot of a device that is being cut")
	close(release)
	if err := errors.Join(<-shrink, <-take); err != nil {
		t.Fatal(err)
	}
	if got := image(t, s, "d0").Size(); got != 512<<10 {
		t.Errorf("the snapshot has %d bytes, want %d", got, 512<<10)
	}
	want(t, i, 1, 0, 1<<20)
}

// TestResizeModel changes a device's size again and again between writes, snapshots
// and their ends, and compares images and increments with plain byte slices.
func TestResizeModel(t *testing.T) {
	rng := newRand(t)
	for range 25 {
		resizeModel(t, rand.New(rand.NewPCG(rng.Uint64(), 0)))
		if t.Failed() {
			return
		}
	}
}

type sizedSnap struct {
	s     *Snapshot
	image []byte
	cut   bool // it may have lost something that was cut behind our back
}

func resizeModel(t *testing.T, r *rand.Rand) {
	const most = 40 * blockSize / SectorSize
	sectors := func() int64 { return (1 + r.Int64N(most)) * SectorSize }
	live := make([]byte, sectors())
	rig := newRig(t, 1, int64(len(live)), 16<<20)
	d := rig.devs[0]
	var snaps []*sizedSnap
	resized := func(size int64) { // the model's part
		if size < int64(len(live)) {
			live = slices.Clone(live[:size])
			return
		}
		live = append(slices.Clone(live), make([]byte, size-int64(len(live)))...)
	}
	for op := range 60 {
		switch r.IntN(8) {
		case 0, 1, 2:
			off := r.Int64N(int64(len(live)))
			n := 1 + r.Int64N(int64(len(live))-off)
			v := byte(1 + r.IntN(255))
			put(t, d, v, off, n)
			fill(live, v, off, n)
		case 3:
			s := rig.takeWith(TakeOptions{Writable: r.IntN(2) == 0}, fmt.Sprint(op))
			snaps = append(snaps, &sizedSnap{s: s, image: slices.Clone(live)})
		case 4:
			if n := len(snaps); n > 0 {
				k := r.IntN(n)
				rig.destroy(snaps[k].s)
				snaps = slices.Delete(snaps, k, k+1)
			}
		case 5:
			if n := len(snaps); n > 0 && image(t, snaps[n/2].s, "d0").Writable() {
				s := snaps[n/2]
				off := r.Int64N(int64(len(s.image)))
				n := 1 + r.Int64N(int64(len(s.image))-off)
				v := byte(1 + r.IntN(255))
				if err := image(t, s.s, "d0").Write(bytes.Repeat([]byte{v}, int(n)), off, false); err == nil {
					fill(s.image, v, off, n)
				} else if !s.cut {
					t.Fatal(err)
				}
			}
		case 6:
			size := sectors()
			for _, s := range snaps {
				s.cut = s.cut || int64(len(s.image)) > size
			}
			rig.resize(0, size)
			resized(size)
		case 7:
			if size := sectors(); size < int64(len(live)) {
				if err := d.Shrink(size); err != nil {
					t.Fatal(err)
				}
				resized(size)
			}
		}
		verifySizes(t, rig, live, snaps)
	}
	rig.close()
	rig.devs, rig.pool, rig.cat = nil, store.NewPool(), newCatalogue(t, "", "")
}

func verifySizes(t *testing.T, r *rig, live []byte, snaps []*sizedSnap) {
	t.Helper()
	wantBytes(t, "the device", r.devs[0], live)
	if got := r.devs[0].State(); got != "ok" {
		t.Fatalf("the device is %s", got)
	}
	for k, s := range snaps {
		i := image(t, s.s, "d0")
		if s.cut && strings.HasPrefix(i.State(), "failed: the origin was cut") {
			continue
		}
		if i.Size() != int64(len(s.image)) {
			t.Fatalf("image %d has %d bytes, want %d", k, i.Size(), len(s.image))
		}
		wantBytes(t, fmt.Sprintf("image %d of %d", k, len(snaps)), i, s.image)
		for _, older := range snaps[:k] {
			if older.cut {
				continue // perhaps not to be read
			}
			runs, ok := i.Changes().Since(image(t, older.s, "d0").Changes().Number())
			if !ok {
				t.Fatal("the generation has ended")
			}
			copied := bytes.Repeat([]byte{0xee}, len(s.image))
			copy(copied, older.image)
			applyRuns(t, copied, s.image, runs)
			if at := firstDiff(copied, s.image); at >= 0 {
				t.Fatalf("the increment to image %d misses byte %d", k, at)
			}
		}
	}
	if err := Check(r.pool, r.devs...); err != nil {
		t.Fatal(err)
	}
}

// applyRuns does what a backup does with runs.
func applyRuns(t *testing.T, to, from []byte, runs func(func(Run, error) bool)) {
	t.Helper()
	for r, err := range runs {
		if err != nil {
			t.Fatal(err)
		}
		if r.Zero {
			clear(to[r.Off : r.Off+r.N])
		} else {
			copy(to[r.Off:r.Off+r.N], from[r.Off:])
		}
	}
}
