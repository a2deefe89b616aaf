package cow

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
)

// wantBytes checks all of an image or device.
func wantBytes(t *testing.T, what string, r interface{ Read([]byte, int64) error }, wanted []byte) {
	t.Helper()
	got := make([]byte, len(wanted))
	if err := r.Read(got, 0); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if bytes.Equal(got, wanted) {
		return
	}
	for n := range got {
		if got[n] != wanted[n] {
			t.Fatalf("%s, byte %d: got %d, want %d", what, n, got[n], wanted[n])
		}
	}
}

// fill sets a range of a model.
func fill(p []byte, v byte, off, n int64) {
	copy(p[off:off+n], bytes.Repeat([]byte{v}, int(n)))
}

// used is how many bytes of the snapstore are in use once everything useless was
// given back.
func (r *rig) used() int64 {
	r.t.Helper()
	for _, d := range r.devs {
		if !d.settle(settleLimit) {
			r.t.Fatal("nothing is given back")
		}
	}
	_, used, _ := r.pool.Space()
	return used
}

func TestWriteToImage(t *testing.T) {
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
		{"the last byte", size - 1, 1},
		{"the last sector", size - 512, 512},
		{"everything", 0, size},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 64<<20)
			d := r.devs[0]
			live := make([]byte, size)
			change := func(v byte, off, n int64) {
				t.Helper()
				put(t, d, v, off, n)
				fill(live, v, off, n)
			}
			change(1, 0, size)
			older := image(t, r.takeWritable("older"), "d0")
			change(2, size/2, 8000) // part of the chunks is in a layer
			held := slices.Clone(live)
			i := image(t, r.takeWritable("s"), "d0")
			newer := image(t, r.takeWritable("newer"), "d0")
			wanted := slices.Clone(held)

			// Before and after the origin changes, over what is in origin, layer
			// and overlay; the second time in the middle of the first.
			for k, w := range [][2]int64{{tc.off, tc.n}, {tc.off + tc.n/3, tc.n/3 + 1}, {tc.off, tc.n}} {
				v := byte(10 + k)
				put(t, i, v, w[0], w[1])
				fill(wanted, v, w[0], w[1])
				wantBytes(t, "the image", i, wanted)
				wantBytes(t, "the device", d, live)
				change(byte(20+k), max(0, tc.off-5000), min(size, tc.off+tc.n+5000)-max(0, tc.off-5000))
				wantBytes(t, "the image after the device changed", i, wanted)
				wantBytes(t, "the newer image", newer, held)
			}
			fill(held, 1, size/2, 8000)
			wantBytes(t, "the older image", older, held)
			if err := i.Flush(); err != nil {
				t.Errorf("flush: %v", err)
			}
		})
	}
}

func TestZeroAndTrimOfImage(t *testing.T) {
	const (
		block = blockSize
		size  = 64*block + 512
	)
	// Of the device, chunk 1 and the first two blocks of chunk 3 are holes. Of the
	// image, blocks 0 to 3 and 32 to 47 were written.
	for _, tc := range []struct {
		name   string
		change func(i *Image) error
		zero   [2]int64 // range of bytes
		used   int64    // blocks of the snapstore
	}{
		{"zero a whole chunk", func(i *Image) error { return i.Zero(0, 16*block) }, [2]int64{0, 16 * block}, 16},
		{"zero a part of what was written", func(i *Image) error { return i.Zero(100, block) }, [2]int64{100, block}, 20},
		{"zero what was not written", func(i *Image) error { return i.Zero(8*block, block) }, [2]int64{8 * block, block}, 21},
		{"zero a whole chunk that was not written", func(i *Image) error { return i.Zero(48*block, 16*block) }, [2]int64{48 * block, 16 * block}, 20},
		{"zero the last sector", func(i *Image) error { return i.Zero(64*block, 512) }, [2]int64{64 * block, 512}, 20},
		{"zero a part of the last sector", func(i *Image) error { return i.Zero(64*block, 500) }, [2]int64{64 * block, 500}, 21},
		{"zero a hole", func(i *Image) error { return i.Zero(17*block, 14*block) }, [2]int64{17 * block, 14 * block}, 20},
		{"zero everything", func(i *Image) error { return i.Zero(0, size) }, [2]int64{0, size}, 0},
		{"zero and leave no hole", func(i *Image) error { return i.WriteZeroes(16*block, 16*block, zeroFlags{NoHole: true}) }, [2]int64{16 * block, 16 * block}, 36},
		{"zero fast", func(i *Image) error { return i.WriteZeroes(32*block, 16*block, zeroFlags{Fast: true}) }, [2]int64{32 * block, 16 * block}, 4},
		{"trim a whole chunk", func(i *Image) error { return i.Trim(32*block, 16*block, false) }, [2]int64{32 * block, 16 * block}, 4},
		{"trim what was not written", func(i *Image) error { return i.Trim(48*block, 16*block, false) }, [2]int64{}, 20},
		{"trim a part", func(i *Image) error { return i.Trim(33*block, 15*block, false) }, [2]int64{}, 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, size, 16<<20)
			d := r.devs[0]
			live := bytes.Repeat([]byte{1}, size)
			put(t, d, 1, 0, size)
			for _, hole := range [][2]int64{{16 * block, 16 * block}, {48 * block, 2 * block}} {
				if err := d.Trim(hole[0], hole[1], false); err != nil {
					t.Fatal(err)
				}
				fill(live, 0, hole[0], hole[1])
			}
			i := image(t, r.takeWritable("s"), "d0")
			put(t, i, 2, 0, 4*block)
			put(t, i, 3, 32*block, 16*block)
			wanted := slices.Clone(live)
			fill(wanted, 2, 0, 4*block)
			fill(wanted, 3, 32*block, 16*block)
			if err := tc.change(i); err != nil {
				t.Fatal(err)
			}
			fill(wanted, 0, tc.zero[0], tc.zero[1])
			wantBytes(t, "the image", i, wanted)
			wantBytes(t, "the device", d, live)
			if got := r.used() / block; got != tc.used {
				t.Errorf("%d blocks of the snapstore are in use, want %d", got, tc.used)
			}
			// What was zeroed can be written again, in part.
			put(t, i, 7, tc.zero[0]+1, 5)
			fill(wanted, 7, tc.zero[0]+1, 5)
			wantBytes(t, "the image, written again", i, wanted)
		})
	}
}

func TestFastZeroOfImage(t *testing.T) {
	r := newRig(t, 1, 4*chunkSize, 16<<20)
	put(t, r.devs[0], 1, 0, 4*chunkSize)
	i := image(t, r.takeWritable("s"), "d0")
	for _, tc := range []struct {
		name   string
		off, n int64
		flags  zeroFlags
	}{
		{"begins in a chunk", blockSize, chunkSize, zeroFlags{Fast: true}},
		{"ends in a chunk", 0, chunkSize + 1, zeroFlags{Fast: true}},
		{"must leave no hole", 0, chunkSize, zeroFlags{Fast: true, NoHole: true}},
	} {
		if err := i.WriteZeroes(tc.off, tc.n, tc.flags); !errors.Is(err, syscall.ENOTSUP) {
			t.Errorf("%s: got %v, want ENOTSUP", tc.name, err)
		}
	}
	want(t, i, 1, 0, 4*chunkSize)
}

func TestImageRefuses(t *testing.T) {
	const size = 1 << 20
	r := newRig(t, 1, size, 16<<20)
	readOnly := image(t, r.take("read-only"), "d0")
	writable := image(t, r.takeWritable("writable"), "d0")
	if readOnly.Writable() || !readOnly.ReadOnly() || !writable.Writable() || writable.ReadOnly() {
		t.Error("an image says the opposite of what it is")
	}
	for _, tc := range []struct {
		name   string
		i      *Image
		off, n int64
		want   error
	}{
		{"read-only", readOnly, 0, 512, syscall.EROFS},
		{"before the start", writable, -1, 512, syscall.ENOSPC},
		{"across the end", writable, size - 511, 512, syscall.ENOSPC},
		{"beyond the end", writable, size, 1, syscall.ENOSPC},
		{"where sums overflow", writable, 1<<63 - 1, 512, syscall.ENOSPC},
		{"nothing", writable, size, 0, nil},
		{"all", writable, 0, size, nil},
	} {
		_, writeAt := tc.i.WriteAt(make([]byte, tc.n), tc.off)
		for what, err := range map[string]error{
			"write":        tc.i.Write(make([]byte, tc.n), tc.off, true),
			"write at":     writeAt,
			"zero":         tc.i.Zero(tc.off, tc.n),
			"write zeroes": tc.i.WriteZeroes(tc.off, tc.n, zeroFlags{}),
			"trim":         tc.i.Trim(tc.off, tc.n, false),
		} {
			if !errors.Is(err, tc.want) {
				t.Errorf("%s %s: got %v, want %v", what, tc.name, err, tc.want)
			}
		}
	}
}

func TestHolesOfWrittenImage(t *testing.T) {
	const block = blockSize
	r := newRig(t, 1, 80*block+512, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 4*block, 8*block)
	put(t, d, 1, 32*block, 16*block)
	i := image(t, r.takeWritable("s"), "d0")
	wantList(t, "runs before", list(t, i.Runs(0, 80*block)), "0+4 zero", "4+8 data", "12+20 zero", "32+16 data", "48+32 zero")

	put(t, i, 2, 10*block, 4*block) // data and hole
	put(t, i, 2, 20*block+5, 1)     // hole
	put(t, i, 2, 48*block, block)   // beside data
	put(t, i, 2, 80*block+500, 12)  // the end
	if err := i.Zero(32*block, 16*block); err != nil {
		t.Fatal(err)
	}
	wantList(t, "runs", list(t, i.Runs(0, 80*block)),
		"0+4 zero", "4+10 data", "14+6 zero", "20+1 data", "21+27 zero", "48+1 data", "49+31 zero")
	wantList(t, "a part", list(t, i.Runs(13*block, 8*block)), "13+1 data", "14+6 zero", "20+1 data")
	wantList(t, "all", list(t, i.Changes().All()), "4+10 data", "20+1 data", "48+1 data", "80+0 data")
	if n, err := i.Allocated(); err != nil || n != 12*block+512 {
		t.Errorf("allocated: got %d, %v, want %d", n, err, 12*block+512)
	}
	for _, tc := range []struct{ off, data, hole int64 }{
		{0, 4 * block, 0},
		{9 * block, 9 * block, 14 * block},
		{14 * block, 20 * block, 14 * block},
		{40 * block, 48 * block, 40 * block},
		{49 * block, 80 * block, 49 * block},
		{80 * block, 80 * block, 80*block + 512},
	} {
		data, err := i.NextData(tc.off)
		if err != nil {
			t.Error(err)
		}
		hole, err := i.NextHole(tc.off)
		if err != nil {
			t.Error(err)
		}
		if data != tc.data || hole != tc.hole {
			t.Errorf("from %d: got data at %d and a hole at %d, want %d and %d", tc.off, data, hole, tc.data, tc.hole)
		}
	}
	if _, err := i.NextData(80*block + 512); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("data at the end: got %v, want ENXIO", err)
	}
}

// TestWriteToImageIsMarked writes to the middle one of three images: its own
// increment, those of newer images to it, and the device's have to read the range.
func TestWriteToImageIsMarked(t *testing.T) {
	const track = 64 << 10
	for _, tc := range []struct {
		name   string
		change func(i *Image) error
		marks  int64
	}{
		{"write", func(i *Image) error { return i.Write([]byte{1}, 3*track+5, false) }, track},
		{"zero a part", func(i *Image) error { return i.Zero(5, 1) }, track},
		{"zero a chunk", func(i *Image) error { return i.Zero(0, track) }, track},
		{"zero a hole", func(i *Image) error { return i.Zero(3*track, track) }, 0},
		{"trim what was not written", func(i *Image) error { return i.Trim(3*track, track, false) }, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, track)
			var images []*Image
			var numbers []uint64
			for k := range 4 {
				i := image(t, r.takeWritable(fmt.Sprint(k)), "d0")
				images, numbers = append(images, i), append(numbers, i.Changes().Number())
			}
			if err := tc.change(images[1]); err != nil {
				t.Fatal(err)
			}
			after := image(t, r.take("after"), "d0")
			for _, q := range []struct {
				what   string
				c      *Changes
				since  uint64
				marked bool
			}{
				{"0 to 1", images[1].Changes(), numbers[0], true},
				{"1 to 1", images[1].Changes(), numbers[1], false},
				{"1 to 2", images[2].Changes(), numbers[1], true},
				{"1 to 3", images[3].Changes(), numbers[1], true},
				{"2 to 3", images[3].Changes(), numbers[2], false},
				{"1 to after", after.Changes(), numbers[1], true},
				{"2 to after", after.Changes(), numbers[2], false},
				{"1 to now", d.Changes(), numbers[1], true},
			} {
				runs, ok := q.c.Since(q.since)
				if !ok {
					t.Fatalf("from %s: not known", q.what)
				}
				var got, wanted int64
				for r := range runs {
					got += r.N
				}
				if q.marked {
					wanted = tc.marks
				}
				if got != wanted {
					t.Errorf("from %s %d bytes changed, want %d", q.what, got, wanted)
				}
			}
			// The older image's map has what it had before, and no more.
			m := make([]byte, 1<<20/track)
			images[0].Changes().ReadMap(m, 0)
			if wanted := append([]byte{byte(numbers[0] - images[0].Changes().Base())}, make([]byte, len(m)-1)...); !bytes.Equal(m, wanted) {
				t.Errorf("the older image's map\n got %v\nwant %v", m, wanted)
			}
		})
	}
}

func TestFullStoreRefusesWriteToImage(t *testing.T) {
	const size = 8 << 20
	r := newRig(t, 1, size, 2<<20)
	d := r.devs[0]
	put(t, d, 1, 0, size)
	s := r.takeWritable("s")
	i := image(t, s, "d0")
	newer := r.take("newer")
	put(t, d, 2, 0, 64<<10)
	// Of the last write some slots are to be had, not all.
	const n = 5 * chunkSize
	var full, before int64
	for {
		_, before, _ = r.pool.Space()
		err := i.Write(bytes.Repeat([]byte{3}, n), full, false)
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		full += n
	}
	if full == 0 {
		t.Fatal("the store was full at once")
	}
	_, after, free := r.pool.Space()
	if after != before {
		t.Errorf("a write that failed took the space in use from %d to %d", before, after)
	}
	if free < 256<<10+chunkSize {
		t.Errorf("%d bytes are free: the image took the reserve, or the last write found nothing", free)
	}
	put(t, i, 3, full, free-256<<10) // fits exactly
	full += free - 256<<10
	want(t, i, 3, 0, full)
	want(t, i, 1, full, size-full)
	if err := i.Zero(full+1, 5); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("zero a part of a block: got %v, want ENOSPC", err)
	}
	if err := i.Write([]byte{1}, size-1, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write to a full store: got %v, want ENOSPC", err)
	}
	put(t, i, 4, 0, full) // in place
	if got := states(s, newer); got != "ok ok" {
		t.Errorf("states: got %s, want ok ok", got)
	}
	// What it gives back it can use again at once.
	if err := i.Trim(0, full, false); err != nil {
		t.Fatal(err)
	}
	put(t, i, 5, size-full, full)
	want(t, i, 0, 0, min(full, size-full))
	want(t, i, 5, size-full, full)
	want(t, image(t, newer, "d0"), 1, 0, size)
}

func TestDestroyGivesOverlayBack(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(t *testing.T, r *rig, s *Snapshot)
	}{
		{"destroyed", func(t *testing.T, r *rig, s *Snapshot) { r.destroy(s) }},
		{"broken", func(t *testing.T, r *rig, s *Snapshot) {
			r.parts[0].hook(func(op string, _, _ int64) error {
				if op == "write" {
					return syscall.ENOSPC
				}
				return nil
			})
			put(t, r.devs[0], 2, 0, 1<<20)
			r.parts[0].hook(nil)
			if got := states(s); got != "overflowed" {
				t.Fatalf("state: got %s, want overflowed", got)
			}
			err := image(t, s, "d0").Write([]byte{1}, 0, false)
			if !errors.Is(err, ErrOverflowed) || !errors.Is(err, syscall.EIO) {
				t.Errorf("write to a broken image: got %v, want ErrOverflowed", err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			put(t, r.devs[0], 1, 0, 1<<20)
			s := r.takeWritable("s")
			i := image(t, s, "d0")
			put(t, i, 2, 100, 300<<10)
			if err := i.Zero(64<<10, 64<<10); err != nil {
				t.Fatal(err)
			}
			if got, wanted := r.used(), i.Holds(); got != wanted || got < 200<<10 {
				t.Errorf("%d bytes are in use, the image holds %d", got, wanted)
			}
			tc.end(t, r, s)
			if got := r.used(); got != 0 {
				t.Errorf("%d bytes are in use after the image ended", got)
			}
			if got := i.Holds(); got != 0 {
				t.Errorf("the image holds %d bytes after it ended", got)
			}
		})
	}
}

func TestImageWriteLeavesFailingPart(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	r.addPart(16 << 20)
	put(t, r.devs[0], 1, 0, 1<<20)
	i := image(t, r.takeWritable("s"), "d0")
	put(t, i, 2, 0, 100<<10)
	r.parts[0].hook(func(op string, off, n int64) error {
		if op == "write" {
			return errIO
		}
		return nil
	})
	put(t, i, 3, 50<<10, 200<<10)
	want(t, i, 2, 0, 50<<10)
	want(t, i, 3, 50<<10, 200<<10)
	want(t, i, 1, 250<<10, 1<<20-250<<10)
}

// TestFaultAtEveryOperationOfOverlay fails the k-th operation on the snapstore, for
// every k: device and other images are right, and the blocks of a write that failed
// are as they were or as they were to become.
func TestFaultAtEveryOperationOfOverlay(t *testing.T) {
	for _, fault := range []error{syscall.EIO, syscall.ENOSPC} {
		for _, spare := range []bool{false, true} {
			for k := 1; ; k++ {
				if !overlayFaultAt(t, k, fault, spare) {
					t.Logf("%v at each of %d operations", fault, k-1)
					break
				}
				if t.Failed() {
					t.Fatalf("%v at operation %d, a second part: %v", fault, k, spare)
				}
			}
		}
	}
}

// overlayFaultAt says whether there was a k-th operation.
func overlayFaultAt(t *testing.T, k int, fault error, spare bool) bool {
	const size = 512 << 10
	r := newRig(t, 1, size, 8<<20)
	if spare {
		r.addPart(8 << 20)
	}
	d := r.devs[0]
	put(t, d, 1, 0, size)
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
	other := image(t, r.takeWritable("other"), "d0")
	i := image(t, r.takeWritable("s"), "d0")
	wanted := bytes.Repeat([]byte{1}, size)
	steps := []func() (v byte, off, n int64, err error){
		func() (byte, int64, int64, error) {
			return 2, 100, 70000, i.Write(bytes.Repeat([]byte{2}, 70000), 100, false)
		},
		func() (byte, int64, int64, error) {
			return 3, 8192, 100, i.Write(bytes.Repeat([]byte{3}, 100), 8192, false)
		},
		func() (byte, int64, int64, error) { return 0, 0, 65536, i.Zero(0, 65536) },
		func() (byte, int64, int64, error) {
			return 4, 5000, 5000, i.Write(bytes.Repeat([]byte{4}, 5000), 5000, false)
		},
		func() (byte, int64, int64, error) { return 0, 66000, 300, i.Zero(66000, 300) },
	}
	for _, step := range steps {
		v, off, n, err := step()
		if i.Err() != nil {
			break
		}
		got := make([]byte, size)
		if readErr := i.Read(got, 0); readErr != nil {
			break // by the fault
		}
		if err == nil {
			fill(wanted, v, off, n)
		}
		for b := off; err != nil && b < off+n; b++ {
			if got[b] == v {
				wanted[b] = v
			}
		}
		if !bytes.Equal(got, wanted) {
			t.Fatalf("fault at operation %d: after a write of %d at %d to %d (%v) the image has other bytes", k, v, off, off+n, err)
		}
		put(t, d, 9, off, n)
		if spare && fault == syscall.ENOSPC && err != nil {
			t.Errorf("fault at operation %d: %v, although another part has room", k, err)
		}
	}
	r.parts[0].hook(nil)
	if other.Err() == nil {
		want(t, other, 1, 0, size)
	}
	if err := i.Err(); err != nil && i.State() == "ok" {
		t.Errorf("fault at operation %d: the image says %v and that it is ok", k, err)
	}
	return n >= k
}
