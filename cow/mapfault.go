// Memory that faults.
//
// Tables, change maps and the rest of what outlives the process are mapped from files. A
// file that somebody cuts short while we run, or a page that cannot be read, faults when
// it is touched. That must not cost the service of the device: whoever touches such
// memory does it under a guard, which catches the fault, and then
//
//  1. all images of the device end, so that nobody who looks at the memory from now on
//     takes what he finds there for what was preserved, and its change tracking is not
//     trusted any more;
//  2. the file is emptied, so that no start does either, and zeroes that cannot fault are
//     put in its place;
//  3. who faulted goes on, or begins again;
//  4. outside the gate a new generation begins.
//
// Emptied, because what is done to the memory afterwards is not in the file. A start takes
// an empty file for one that was lost.
//
// A word that was in the memory is nowhere any more. Its slot stays in use until the next
// start: no other table has it, so nothing gives it back.
//
// A guard stands where locks are released on the way to it, and Device.mu is not held.

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"
	"unsafe"
	"weak"

	"github.com/google/uuid"
)

// mappings are the memories that are mapped from files, by where they begin.
var mappings = struct {
	sync.Mutex
	at map[uintptr]weak.Pointer[memory]
}{at: make(map[uintptr]weak.Pointer[memory])}

// mapped notes that m may fault.
func (m *memory) mapped() {
	mappings.Lock()
	defer mappings.Unlock()
	mappings.at[addressOf(m.reserved)] = weak.Make(m)
}

// unmapped takes back what mapped noted of the memory b.
func unmapped(b []byte) {
	mappings.Lock()
	defer mappings.Unlock()
	delete(mappings.at, addressOf(b))
}

func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// mappedAt is the memory that r, what a panic was called with, says has faulted, and the
// offset in it; nil where r is anything else.
func mappedAt(r any) (*memory, int64) {
	e, ok := r.(interface{ Addr() uintptr })
	if !ok {
		return nil, 0
	}
	mappings.Lock()
	defer mappings.Unlock()
	for _, p := range mappings.at {
		if m := p.Value(); m != nil {
			if off := int64(e.Addr() - addressOf(m.reserved)); off >= 0 && off < m.Len() {
				return m, off
			}
		}
	}
	return nil, 0
}

// replace empties m's file and puts zeroes in its place. One caller at a time; Grow may
// run meanwhile.
func (m *memory) replace() error {
	// First, because a Grow that does not see it has its bytes counted by now.
	m.lost.Store(true)
	n := m.Len()
	if err := m.file.Truncate(0); err != nil {
		return err
	}
	err := m.backAnonymous(0, n)
	if err == nil {
		m.replaced = n
	}
	return err
}

// guarded calls f and says whether it came to its end: false where memory faulted. Then
// nothing of the device can fault there any more, and none of its images is healthy.
// Device.mu is not held.
func (d *Device) guarded(f func()) (ok bool) {
	defer d.caught(debug.SetPanicOnFault(true))
	f()
	return true
}

// always is guarded for what can begin again.
func (d *Device) always(f func()) {
	for !d.guarded(f) {
	}
}

func (d *Device) caught(was bool) {
	debug.SetPanicOnFault(was)
	if r := recover(); r != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.loseMemoryLocked(r, true)
	}
}

// guardedLocked is guarded for who holds Device.mu.
func (d *Device) guardedLocked(f func()) (ok bool) {
	defer d.caughtLocked(debug.SetPanicOnFault(true), true)
	f()
	return true
}

func (d *Device) caughtLocked(was, all bool) {
	debug.SetPanicOnFault(was)
	if r := recover(); r != nil {
		d.loseMemoryLocked(r, all)
	}
}

// loseMemoryLocked does what a fault costs, once for each memory; r is what was caught.
// With all unset the device has lost its images already.
func (d *Device) loseMemoryLocked(r any, all bool) {
	m, off := mappedAt(r)
	if m == nil {
		panic(r)
	}
	if off < m.replaced {
		return // somebody else was here before
	}
	why := m.whyLost()
	var lost []*Image
	if all {
		f := failed(why)
		lost = slices.Clone(d.images)
		for _, i := range lost {
			i.fault.Store(f)
		}
		d.changes().Distrust()
	}
	if err := m.replace(); err != nil {
		panic(fmt.Errorf("%v; %s: %w", r, why, err))
	}
	for _, i := range lost {
		d.noteLostLocked(i)
		d.retireImageLocked(i)
	}
	switch {
	case !all:
	case d.closed:
		d.late = append(d.late, lateFault{why, lost})
	default:
		d.running.Go(func() { d.beginAnew(why, lost) })
	}
}

// lateFault is what a fault has cost that came while the device closed. No generation
// begins any more: what is written down of the map is as sound as it was, and a map that
// was lost itself is an empty file, which the next start notices.
type lateFault struct {
	why  string
	lost []*Image
}

// tellLate tells of what faults have cost while the device closed.
func (d *Device) tellLate() {
	d.mu.Lock()
	late := d.late
	d.late = nil
	d.mu.Unlock()
	for _, f := range late {
		d.tellFault(f.why, f.lost)
	}
}

// tellFault tells of the images that a fault has cost.
func (d *Device) tellFault(why string, lost []*Image) {
	d.cfg.Log.Error("state lost", "err", why)
	for _, i := range lost {
		d.tellBroken(i, EventSnapshotFailed, errors.New(why))
	}
}

// whyLost says it of memory that faults.
func (m *memory) whyLost() string {
	return filepath.Base(m.file.Name()) + " cannot be read any more: it was cut short, or its memory fails"
}

// opening calls f, which looks at what a predecessor left, and returns what it returns. Where
// memory faults, its file is emptied, and the error says so: what was found until then is
// to be given up. Nobody else has the device.
func (d *Device) opening(f func() error) (err error) {
	defer func(was bool) {
		debug.SetPanicOnFault(was)
		if r := recover(); r != nil {
			if m, _ := mappedAt(r); m != nil {
				err = errors.New(m.whyLost())
			}
			d.loseMemoryLocked(r, false)
		}
	}(debug.SetPanicOnFault(true))
	return f()
}

// noteLostLocked notes the fault of an image where a start finds it, if that is still
// possible.
func (d *Device) noteLostLocked(i *Image) {
	defer d.caughtLocked(debug.SetPanicOnFault(true), false)
	f := i.fault.Load()
	i.layer.setFault(f.kind, f.reason())
}

// beginAnew tells of the images that a fault has cost, and begins a new generation.
func (d *Device) beginAnew(why string, lost []*Image) {
	d.tellFault(why, lost)
	for {
		err := d.Reset(why)
		if err == nil {
			err = d.renewRegister()
		}
		if err == nil || errors.Is(err, ErrStopping) {
			return
		}
		select {
		case <-d.stop:
			return
		case <-time.After(time.Second): // writes in flight hang: try again
		}
	}
}

// renewChanges puts a new file in the place of a lost change map, and says whether there is
// a new map, of that generation. The gate is empty.
func (d *Device) renewChanges(generation uuid.UUID) bool {
	was, mem := d.changes(), d.mapMemory
	if !mem.lost.Load() {
		return false
	}
	d.cfg.Number, d.cfg.TrackingBlock = max(d.cfg.Number, was.Number()+1), was.BlockSize()
	err := os.RemoveAll(d.path("changes"))
	if err == nil {
		err = d.newChanges(generation)
	}
	if err != nil {
		d.mapMemory = mem
		d.cfg.Log.Error("cannot make a new change map: the next start gives the snapshots up", "err", err)
		return false
	}
	was.Close()
	return true
}

// replaceLease makes a new lease where it is lost.
func (d *Device) replaceLease() error {
	if !d.leaseMemory.lost.Load() {
		return nil
	}
	d.leasing.Lock()
	defer d.leasing.Unlock()
	mem, _, _, err := d.openLease()
	if mem == nil {
		return err
	}
	d.leased.Store(0)
	return d.beginLease(mem)
}

// renewRegister makes a new register where it is lost.
func (d *Device) renewRegister() error {
	d.taking.Lock()
	defer d.taking.Unlock()
	if d.stopped() {
		return ErrStopping
	}
	was := d.register
	if was == nil || !was.mem.lost.Load() {
		return nil
	}
	r, err := newRegister(d.path(registerName))
	if err != nil {
		return err
	}
	was.mem.closeWhenUnused() // layers that are not given back yet know it
	d.register = r
	d.mu.Lock()
	defer d.mu.Unlock()
	// Of snapshots that came about meanwhile; those without a name, too, because others
	// read through them. The newest first: who is killed in between leaves none that
	// lacks one which is newer.
	for _, l := range slices.Backward(d.layers) {
		d.guardedLocked(func() { err = errors.Join(err, r.add(l)) })
	}
	return err
}

// errCatalogue answers who takes a snapshot when the catalogue is lost: a start would not
// know it.
var errCatalogue = fmt.Errorf("the catalogue of snapshots cannot be read any more, a restart begins a new one: %w", syscall.EIO)

// guarded calls f, which touches the catalogue, and says whether it came to its end. Where
// the catalogue faults its snapshots go on until the process ends.
func (c *Catalogue) guarded(f func()) (ok bool) {
	defer c.caught(debug.SetPanicOnFault(true))
	f()
	return true
}

func (c *Catalogue) caught(was bool) {
	debug.SetPanicOnFault(was)
	r := recover()
	if r == nil {
		return
	}
	c.replacing.Lock()
	defer c.replacing.Unlock()
	m, off := mappedAt(r)
	if m == nil || m != c.mem {
		panic(r)
	}
	if off >= m.replaced {
		if err := m.replace(); err != nil {
			panic(err)
		}
	}
}

// errFaulted is of what was begun and cannot be ended.
var errFaulted = fmt.Errorf("memory of the state has failed: %w", syscall.EIO)

// guarded calls f and returns what it returns, or why the image is lost.
func (i *Image) guarded(f func() error) (err error) {
	if !i.device.guarded(func() { err = f() }) {
		return cmp.Or(i.Err(), errFaulted)
	}
	return err
}
