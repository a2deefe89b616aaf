package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"blksnap/store"
)

var (
	seed   = flag.Uint64("seed", 0, "seed of the random tests; 0: a new one")
	rounds = flag.Int("rounds", 12, "rounds of the model test")
)

func newRand(t *testing.T) *rand.Rand {
	s := *seed
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("repeat with -seed=%d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// stamp fills whole sectors with what they are: device, offset, pass.
func stamp(p []byte, dev int, off int64, pass uint32) {
	for i := 0; i+SectorSize <= len(p); i += SectorSize {
		s := p[i : i+SectorSize]
		for j := 0; j < SectorSize; j += 16 {
			binary.LittleEndian.PutUint64(s[j:], uint64(off)+uint64(i))
			binary.LittleEndian.PutUint32(s[j+8:], pass)
			binary.LittleEndian.PutUint32(s[j+12:], uint32(dev)+1)
		}
	}
}

// told says what a sector says.
func told(p []byte) string {
	if len(p) < 16 {
		return "less than a sector"
	}
	if bytes.Equal(p, make([]byte, len(p))) {
		return "zeroes"
	}
	for j := 16; j+16 <= len(p); j += 16 {
		if !bytes.Equal(p[j:j+16], p[:16]) {
			return "a torn sector"
		}
	}
	return fmt.Sprintf("sector %d of device %d, pass %d", binary.LittleEndian.Uint64(p),
		int(binary.LittleEndian.Uint32(p[12:]))-1, binary.LittleEndian.Uint32(p[8:]))
}

func compare(t *testing.T, what string, got, want []byte, off int64) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := 0; i < len(got); i += SectorSize {
		e := min(i+SectorSize, len(got))
		if !bytes.Equal(got[i:e], want[i:e]) {
			t.Fatalf("%s: at %d\n got %s\nwant %s", what, off+int64(i), told(got[i:e]), told(want[i:e]))
		}
	}
}

// model is what a device and its images must hold. Writers work in disjoint
// regions, each with its own lock, so that the model is exact while they run.
type model struct {
	rig     *rig
	size    int64
	regions int64
	pass    atomic.Uint32
	regionL []sync.RWMutex // held shared by writers of a region, exclusively by who takes a snapshot
	live    [][]byte       // by device
	snaps   []*modelSnap
	mu      sync.RWMutex // protects snaps; held shared by readers of images
}

type modelSnap struct {
	s      *Snapshot
	images [][]byte // by device
	held   [][]byte // the same without what was written to them

	// written are by device and region: held exclusively by who writes to the
	// image, shared by who compares it.
	written [][]sync.RWMutex
}

// TestModel compares the engine with plain byte slices: random writes, zeroes,
// trims, snapshots, destroys, rollbacks, reads of and writes to images, and
// overflows from many goroutines. Every image is compared in full at the end of each round.
func TestModel(t *testing.T) {
	for _, tc := range []struct {
		name  string
		limit int64
	}{
		{"ample store", 256 << 20},
		{"store that overflows", 1 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) { runModel(t, tc.limit) })
	}
}

func runModel(t *testing.T, limit int64) {
	const devices = 2
	rng := newRand(t)
	m := &model{size: 2<<20 - 1536, regions: 4}
	m.rig = newRig(t, devices, m.size, limit)
	m.rig.addPart(limit) // images spill
	m.regionL = make([]sync.RWMutex, m.regions*devices)
	for range devices {
		m.live = append(m.live, make([]byte, m.size))
	}
	for round := range *rounds {
		var workers sync.WaitGroup
		for w := range int(m.regions) * devices {
			r := rand.New(rand.NewPCG(rng.Uint64(), 0))
			workers.Go(func() { m.write(t, w, r, 60) })
		}
		for range 3 {
			r := rand.New(rand.NewPCG(rng.Uint64(), 0))
			workers.Go(func() { m.readImages(t, r, 100) })
		}
		for range 2 {
			r := rand.New(rand.NewPCG(rng.Uint64(), 0))
			workers.Go(func() { m.writeImages(t, r, 60) })
		}
		r := rand.New(rand.NewPCG(rng.Uint64(), 0))
		workers.Go(func() { m.churn(t, round, r) })
		workers.Wait()
		if t.Failed() {
			return
		}
		m.verify(t)
	}
}

// write changes random ranges of one region of one device.
func (m *model) write(t *testing.T, worker int, r *rand.Rand, ops int) {
	dev, region := worker/int(m.regions), int64(worker)%m.regions
	d, live := m.rig.devs[dev], m.live[dev]
	for range ops {
		off, n := m.within(region, r)
		m.regionL[worker].RLock()
		err := m.change(d, live, dev, off, n, r)
		m.regionL[worker].RUnlock()
		if err != nil {
			t.Errorf("origin failed: %v", err)
			return
		}
	}
}

// region is where region k begins and ends.
func (m *model) region(k int64) (from, to int64) {
	from = m.size / m.regions * k &^ (SectorSize - 1)
	to = m.size / m.regions * (k + 1) &^ (SectorSize - 1)
	if k == m.regions-1 {
		to = m.size
	}
	return from, to
}

// within is a random range of sectors in region k.
func (m *model) within(k int64, r *rand.Rand) (off, n int64) {
	from, to := m.region(k)
	off = from + r.Int64N((to-from)/SectorSize)*SectorSize
	return off, min(to-off, (1+r.Int64N(16<<r.IntN(6)))*SectorSize)
}

// change makes one random change in the device and the model.
func (m *model) change(d *Device, live []byte, dev int, off, n int64, r *rand.Rand) error {
	switch r.IntN(10) {
	case 0:
		clear(live[off : off+n])
		return d.WriteZeroes(off, n, zeroFlags{NoHole: r.IntN(2) == 0})
	case 1:
		// Each byte keeps its value or becomes zero: ask the device which.
		if err := d.Trim(off, n, false); err != nil {
			return err
		}
		got := make([]byte, n)
		if err := d.Read(got, off); err != nil {
			return err
		}
		for i, b := range got {
			if b != 0 && b != live[off+int64(i)] {
				return fmt.Errorf("byte %d after a trim: got %d, want %d or 0", off+int64(i), b, live[off+int64(i)])
			}
		}
		copy(live[off:], got)
		return nil
	case 2: // bytes at no boundary
		p := []byte{byte(r.Uint32()), 1, 2}
		off += r.Int64N(SectorSize - 3)
		copy(live[off:], p)
		return d.Write(p, off, false)
	}
	p := make([]byte, n)
	stamp(p, dev, off, m.pass.Add(1))
	copy(live[off:], p)
	if r.IntN(2) == 0 {
		err := tryWrite(d, p, off)
		if err != syscall.EAGAIN {
			return err
		}
	}
	return d.Write(p, off, r.IntN(8) == 0)
}

// churn takes and destroys snapshots, and rolls back to them.
func (m *model) churn(t *testing.T, round int, r *rand.Rand) {
	for k := range 8 {
		if n := len(m.snaps); n > 0 && r.IntN(5) == 0 {
			if err := m.rollBack(m.snaps[r.IntN(n)], r.IntN(len(m.live))); err != nil {
				t.Error(err)
			}
			continue
		}
		if r.IntN(3) == 0 || len(m.snaps) > 7 {
			m.mu.Lock()
			if n := len(m.snaps); n > 0 {
				k := r.IntN(n)
				if err := m.snaps[k].s.Destroy(false); err != nil {
					t.Errorf("destroy: %v", err)
				}
				m.snaps = slices.Delete(m.snaps, k, k+1)
			}
			m.mu.Unlock()
			continue
		}
		// Writers stop for a moment so that the model knows the instant; that
		// the engine needs no such help the test of the instant shows.
		for i := range m.regionL {
			m.regionL[i].Lock()
		}
		o := TakeOptions{Limit: time.Minute, Writable: r.IntN(2) == 0}
		if r.IntN(3) == 0 {
			o.MaxStore = 1 + r.Int64N(2*m.size) | blockSize
		}
		s, err := m.rig.cat.Take(fmt.Sprintf("s%d.%d", round, k), m.rig.devs, o)
		if err == nil {
			ms := &modelSnap{s: s}
			for _, live := range m.live {
				ms.images, ms.held = append(ms.images, slices.Clone(live)), append(ms.held, slices.Clone(live))
				ms.written = append(ms.written, make([]sync.RWMutex, m.regions))
			}
			m.mu.Lock()
			m.snaps = append(m.snaps, ms)
			m.mu.Unlock()
		} else {
			t.Errorf("take: %v", err)
		}
		for i := range m.regionL {
			m.regionL[i].Unlock()
		}
	}
}

// rollBack rolls a device back. Writers stop meanwhile: they would be refused.
func (m *model) rollBack(ms *modelSnap, dev int) error {
	for k := range m.regions {
		l := &m.regionL[int64(dev)*m.regions+k]
		l.Lock()
		defer l.Unlock()
	}
	i := ms.s.Images()[dev]
	err := i.Rollback()
	switch {
	case err == nil:
		copy(m.live[dev], ms.held[dev])
	case errors.Is(err, ErrOverflowed) && i.State() == "overflowed":
		err = nil // before: nobody writes
	case errors.Is(err, store.ErrFull):
		err = nil
	}
	return err
}

// readImages reads random ranges of random images.
func (m *model) readImages(t *testing.T, r *rand.Rand, ops int) {
	for range ops {
		m.mu.RLock()
		if len(m.snaps) > 0 {
			ms := m.snaps[r.IntN(len(m.snaps))]
			dev := r.IntN(len(ms.images))
			off := r.Int64N(m.size)
			n := min(m.size-off, 1+r.Int64N(1<<20))
			unlock := m.lockRegions(ms, dev, off, n)
			m.compareImage(t, ms, dev, off, n)
			unlock()
		}
		m.mu.RUnlock()
	}
}

// lockRegions keeps writers out of a range of an image.
func (m *model) lockRegions(ms *modelSnap, dev int, off, n int64) (unlock func()) {
	var locked []*sync.RWMutex
	for k := range m.regions {
		if from, to := m.region(k); from < off+n && off < to {
			l := &ms.written[dev][k]
			l.RLock()
			locked = append(locked, l)
		}
	}
	return func() {
		for _, l := range locked {
			l.RUnlock()
		}
	}
}

// writeImages changes random ranges of random images.
func (m *model) writeImages(t *testing.T, r *rand.Rand, ops int) {
	for range ops {
		m.mu.RLock()
		if len(m.snaps) > 0 {
			ms := m.snaps[r.IntN(len(m.snaps))]
			dev, k := r.IntN(len(ms.images)), r.Int64N(m.regions)
			if i := ms.s.Images()[dev]; i.Writable() {
				ms.written[dev][k].Lock()
				off, n := m.within(k, r)
				if err := m.changeImage(i, ms.images[dev], dev, off, n, r); err != nil {
					t.Errorf("image %s of device %d: %v", ms.s.Name(), dev, err)
				}
				ms.written[dev][k].Unlock()
			}
		}
		m.mu.RUnlock()
	}
}

// changeImage makes one random change in an image and the model.
func (m *model) changeImage(i *Image, model []byte, dev int, off, n int64, r *rand.Rand) error {
	p := make([]byte, n)
	var err error
	switch r.IntN(8) {
	case 0:
		err = i.WriteZeroes(off, n, zeroFlags{NoHole: r.IntN(3) == 0})
	case 1:
		if err = i.Trim(off, n, false); err == nil {
			err = syscall.ENOSPC // each byte keeps its value or becomes zero
		}
	case 2: // bytes at no boundary
		p = []byte{byte(r.Uint32()), 1, 2}
		off += r.Int64N(SectorSize - 3)
		err = i.Write(p, off, false)
	default:
		stamp(p, dev, off, m.pass.Add(1))
		err = i.Write(p, off, false)
	}
	switch {
	case err == nil:
		copy(model[off:], p)
		return nil
	case errors.Is(err, ErrOverflowed) && i.State() == "overflowed":
		return nil
	case !errors.Is(err, syscall.ENOSPC):
		return err
	}
	// Ask the image which of the blocks are as they were and which are as they
	// were to become.
	got := make([]byte, len(p))
	if err := i.Read(got, off); errors.Is(err, ErrOverflowed) {
		return nil
	} else if err != nil {
		return err
	}
	for k, b := range got {
		if b != p[k] && b != model[off+int64(k)] {
			return fmt.Errorf("byte %d: got %d, want %d or %d", off+int64(k), b, model[off+int64(k)], p[k])
		}
	}
	copy(model[off:], got)
	return nil
}

func (m *model) compareImage(t *testing.T, ms *modelSnap, dev int, off, n int64) {
	i := ms.s.Images()[dev]
	got := make([]byte, n)
	err := i.Read(got, off)
	switch {
	case errors.Is(err, ErrOverflowed) && i.State() == "overflowed":
	case err != nil:
		t.Errorf("read image: %v", err)
	case bytes.Equal(got, ms.images[dev][off:off+n]):
	default:
		want := ms.images[dev][off : off+n]
		for k := range got {
			if got[k] != want[k] {
				s := k &^ (SectorSize - 1)
				e := min(s+SectorSize, len(got))
				t.Errorf("image %s of device %d: at %d\n got %s\nwant %s", ms.s.Name(), dev, off+int64(k), told(got[s:e]), told(want[s:e]))
				return
			}
		}
	}
}

// verify compares everything in full, and the books.
func (m *model) verify(t *testing.T) {
	t.Helper()
	for dev, d := range m.rig.devs {
		got := make([]byte, m.size)
		if err := d.Read(got, 0); err != nil {
			t.Fatal(err)
		}
		compare(t, fmt.Sprintf("device %d", dev), got, m.live[dev], 0)
	}
	for _, ms := range m.snaps {
		for dev := range ms.images {
			m.compareImage(t, ms, dev, 0, m.size)
		}
	}
	m.verifyChanges(t)
	if err := Check(m.rig.pool, m.rig.devs...); err != nil {
		t.Fatal(err)
	}
}

// verifyChanges checks that the difference of any two images is inside what the
// newer one's change map reports, with zero runs that are zero, and that all data
// is inside what a full copy reads.
func (m *model) verifyChanges(t *testing.T) {
	t.Helper()
	for b, newer := range m.snaps {
		for dev := range newer.images {
			i := newer.s.Images()[dev]
			if i.Err() != nil {
				continue
			}
			full := make([]byte, m.size)
			m.apply(t, full, newer.images[dev], i.Changes().All())
			compare(t, "full copy of "+newer.s.Name(), full, newer.images[dev], 0)
			for _, older := range m.snaps[:b] {
				num := older.s.Images()[dev].Changes().Number()
				runs, ok := i.Changes().Since(num)
				if !ok {
					t.Fatalf("%s does not know what changed since %d", newer.s.Name(), num)
				}
				copied := slices.Clone(older.images[dev])
				m.apply(t, copied, newer.images[dev], runs)
				compare(t, fmt.Sprintf("%s and the increment to %s", older.s.Name(), newer.s.Name()), copied, newer.images[dev], 0)
			}
		}
	}
}

// apply does what a backup does with runs.
func (m *model) apply(t *testing.T, to, from []byte, runs func(func(Run, error) bool)) {
	t.Helper()
	end := int64(0)
	for r, err := range runs {
		if err != nil {
			t.Fatal(err)
		}
		if r.N <= 0 || r.Off < end || r.Off+r.N > m.size {
			t.Fatalf("run %+v after %d: not ascending, or beyond the device", r, end)
		}
		end = r.Off + r.N
		if r.Zero {
			clear(to[r.Off:end])
		} else {
			copy(to[r.Off:end], from[r.Off:end])
		}
	}
}
