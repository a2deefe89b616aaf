// A Source in memory, for the tests.

package fusefs

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// errDestroyed is what a fake image answers after its snapshot is destroyed.
var errDestroyed = errors.New("snapshot is destroyed")

// fakeSource takes snapshots that are plain copies.
type fakeSource struct {
	taking func() // called by Take before anything else; may be nil

	mu      sync.Mutex
	tree    *Tree
	devices map[string]*fakeDevice
	snaps   map[string]*fakeSnapshot
	order   []string // of snaps, oldest first
	taken   uint64
}

func newFakeSource() *fakeSource {
	return &fakeSource{devices: map[string]*fakeDevice{}, snaps: map[string]*fakeSnapshot{}}
}

func (s *fakeSource) Version() string { return "blksnap 0.0.0" }

func (s *fakeSource) Devices() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sortedKeys(s.devices)
}

func (s *fakeSource) Device(name string) (Device, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, ok := s.devices[name]
	return d, ok
}

func (s *fakeSource) Snapshots() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sortedKeys(s.snaps)
}

func (s *fakeSource) Snapshot(name string) (Snapshot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sn, ok := s.snaps[name]
	return sn, ok
}

func (s *fakeSource) Latest() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.order) == 0 {
		return ""
	}
	return s.order[len(s.order)-1]
}

func (s *fakeSource) Space() (size, free int64) { return 1 << 30, 1 << 29 }

func (s *fakeSource) Take(name string) error {
	if s.taking != nil {
		s.taking()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case name == "bad,name":
		return fmt.Errorf("take %s: %w", name, syscall.EINVAL)
	case name == "full":
		return fmt.Errorf("take %s: %w", name, syscall.ENOSPC)
	case name == "odd":
		return errors.New("something else")
	case s.snaps[name] != nil:
		return fmt.Errorf("take %s: %w", name, syscall.EEXIST)
	}
	s.taken++
	snap := &fakeSnapshot{created: time.Now(), images: map[string]*fakeImage{}}
	for dev, d := range s.devices {
		snap.images[dev] = d.image(s.taken)
	}
	s.snaps[name] = snap
	s.order = append(s.order, name)
	return nil
}

// Destroy tells the tree from within, as the tree's contract allows.
func (s *fakeSource) Destroy(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	snap, ok := s.snaps[name]
	if !ok {
		return fmt.Errorf("destroy %s: %w", name, syscall.ENOENT)
	}
	for _, im := range snap.images {
		if im.users.Load() > 0 {
			return fmt.Errorf("destroy %s: %w", name, syscall.EBUSY)
		}
	}
	s.dropLocked(name)
	return nil
}

// force destroys a snapshot also if it is in use.
func (s *fakeSource) force(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(name)
}

func (s *fakeSource) dropLocked(name string) {
	for _, im := range s.snaps[name].images {
		im.destroyed.Store(true)
	}
	delete(s.snaps, name)
	s.order = slices.DeleteFunc(s.order, func(n string) bool { return n == name })
	if s.tree != nil {
		s.tree.SnapshotDestroyed(name)
	}
}

// add adds a device that holds content.
func (s *fakeSource) add(name string, content []byte) *fakeDevice {
	d := &fakeDevice{name: name, content: content, changes: &fakeChanges{
		device: int64(len(content)), block: 64 << 10, number: 0,
		generation: "9b2f6c8e-35a7-4a54-8e8f-3f1b5a4c7d60",
		m:          make([]byte, (len(content)+65535)/65536),
	}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devices[name] = d
	return d
}

func (s *fakeSource) remove(name string) {
	s.mu.Lock()
	delete(s.devices, name)
	s.mu.Unlock()
	s.tree.DeviceRemoved(name)
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

type fakeDevice struct {
	name string

	mu      sync.Mutex
	content []byte
	changes *fakeChanges
	state   string
}

func (d *fakeDevice) Origin() string { return "/srv/" + d.name + ".img" }
func (d *fakeDevice) URI() string    { return "nbd+unix:///" + d.name + "?socket=/run/nbd.sock" }

func (d *fakeDevice) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.content))
}

func (d *fakeDevice) State() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state == "" {
		return "ok"
	}
	return d.state
}

func (d *fakeDevice) Changes() Changes {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changes
}

func (d *fakeDevice) Tracking() Tracking { return d.Changes() }

// write changes the device and its map.
func (d *fakeDevice) write(p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.content = slices.Clone(d.content)
	copy(d.content[off:], p)
	c := d.changes.clone()
	for b := off / c.block; b*c.block < off+int64(len(p)); b++ {
		c.m[b] = byte(c.number + 1 - c.base)
	}
	d.changes = c
}

// set replaces what the tree shows as the device's changes.
func (d *fakeDevice) set(c *fakeChanges) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changes = c
}

func (d *fakeDevice) image(number uint64) *fakeImage {
	d.mu.Lock()
	defer d.mu.Unlock()
	frozen := d.changes.clone()
	frozen.number = number
	frozen.numbers = append(slices.Clone(frozen.numbers[max(0, len(frozen.numbers)-3):]), number)
	live := frozen.clone()
	d.changes = live
	return &fakeImage{content: slices.Clone(d.content), changes: frozen}
}

type fakeSnapshot struct {
	created time.Time
	state   atomic.Pointer[string]
	images  map[string]*fakeImage
}

func (s *fakeSnapshot) Created() time.Time { return s.created }

func (s *fakeSnapshot) State() string {
	if p := s.state.Load(); p != nil {
		return *p
	}
	return "ok"
}

func (s *fakeSnapshot) Images() []string { return sortedKeys(s.images) }

func (s *fakeSnapshot) Image(device string) (Image, bool) {
	im, ok := s.images[device]
	return im, ok
}

// fakeImage has a hole where 4 KiB of its content are zero, as first found.
type fakeImage struct {
	users     atomic.Int64
	destroyed atomic.Bool
	writable  bool
	synced    atomic.Int64
	reading   func(off int64) error // called by ReadAt before anything else; may be nil

	mu      sync.RWMutex
	content []byte
	changes *fakeChanges
}

const fakeBlock = 4096

func (im *fakeImage) ReadAt(p []byte, off int64) (int, error) {
	if im.reading != nil {
		if err := im.reading(off); err != nil {
			return 0, err
		}
	}
	im.mu.RLock()
	defer im.mu.RUnlock()
	if off >= int64(len(im.content)) {
		return 0, io.EOF
	}
	n := copy(p, im.content[off:])
	switch {
	case im.destroyed.Load():
		return n, errDestroyed // looks afterwards, as a real one does
	case n < len(p):
		return n, io.EOF
	}
	return n, nil
}

func (im *fakeImage) WriteAt(p []byte, off int64) (int, error) {
	if !im.writable {
		return 0, syscall.EROFS
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	return copy(im.content[off:], p), nil
}

func (im *fakeImage) Zero(off, n int64) error {
	if !im.writable {
		return syscall.EROFS
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	clear(im.content[off : off+n])
	return nil
}

func (im *fakeImage) Sync() error {
	im.synced.Add(1)
	return nil
}

func (im *fakeImage) Writable() bool { return im.writable }

func (im *fakeImage) Size() int64 {
	im.mu.RLock()
	defer im.mu.RUnlock()
	return int64(len(im.content))
}

func (im *fakeImage) State() string {
	if im.destroyed.Load() {
		return "failed: destroyed"
	}
	return "ok"
}

// isHoleLocked says whether the block at off is zero.
func (im *fakeImage) isHoleLocked(off int64) bool {
	b := im.content[off:min(off+fakeBlock, int64(len(im.content)))]
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

func (im *fakeImage) Allocated() (int64, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	var n int64
	for off := int64(0); off < int64(len(im.content)); off += fakeBlock {
		if !im.isHoleLocked(off) {
			n += fakeBlock
		}
	}
	return n, nil
}

func (im *fakeImage) next(off int64, hole bool) int64 {
	im.mu.RLock()
	defer im.mu.RUnlock()
	for off < int64(len(im.content)) {
		if im.isHoleLocked(off&^(fakeBlock-1)) == hole {
			return off
		}
		off = off&^(fakeBlock-1) + fakeBlock
	}
	return int64(len(im.content))
}

func (im *fakeImage) NextData(off int64) (int64, error) {
	n := im.next(off, false)
	if n == im.Size() {
		return 0, unix.ENXIO
	}
	return n, nil
}

func (im *fakeImage) NextHole(off int64) (int64, error) { return im.next(off, true), nil }

func (im *fakeImage) Acquire() error {
	if im.destroyed.Load() {
		return errDestroyed
	}
	im.users.Add(1)
	return nil
}

func (im *fakeImage) Release() { im.users.Add(-1) }

func (im *fakeImage) Changes() Changes {
	im.mu.RLock()
	defer im.mu.RUnlock()
	return im.changes
}

// mark marks a tracking block in the frozen map, as a write to a writable image
// does.
func (im *fakeImage) mark(block int64) {
	im.mu.Lock()
	defer im.mu.Unlock()
	c := im.changes.clone()
	c.m[block] = byte(c.number - c.base)
	im.changes = c
}

// fakeChanges never change; whoever changes something makes a clone.
type fakeChanges struct {
	device, block int64
	generation    string
	number, base  uint64
	numbers       []uint64
	m             []byte
	content       []byte        // says which runs are zero, if not nil
	reads         *atomic.Int64 // counts the passes over the runs, if not nil
	fail          error         // after the last run
}

func (c *fakeChanges) clone() *fakeChanges {
	d := *c
	d.m = slices.Clone(c.m)
	return &d
}

func (c *fakeChanges) MapSize() int64                  { return int64(len(c.m)) }
func (c *fakeChanges) ReadMap(p []byte, off int64) int { return copy(p, c.m[min(off, c.MapSize()):]) }
func (c *fakeChanges) BlockSize() int64                { return c.block }
func (c *fakeChanges) Generation() string              { return c.generation }
func (c *fakeChanges) Number() uint64                  { return c.number }
func (c *fakeChanges) Base() uint64                    { return c.base }
func (c *fakeChanges) Numbers() []uint64               { return c.numbers }

func (c *fakeChanges) Since(num uint64) (iter.Seq2[Run, error], bool) {
	if num < c.base || num > c.number {
		return nil, false
	}
	return c.runs(func(b byte) bool { return uint64(b)+c.base > num && b != 0 }), true
}

func (c *fakeChanges) All() iter.Seq2[Run, error] {
	all := c.runs(func(byte) bool { return true })
	if c.content == nil {
		return all
	}
	return func(yield func(Run, error) bool) {
		for r, err := range all {
			if (err != nil || !r.Zero) && !yield(r, err) {
				return
			}
		}
	}
}

// runs yields the runs of tracking blocks that match. Those are cut where content
// begins or ends to be zero; without content every third is zero.
func (c *fakeChanges) runs(match func(byte) bool) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		if c.reads != nil {
			c.reads.Add(1)
		}
		for b, count := 0, 0; b < len(c.m); b++ {
			first := b
			for b < len(c.m) && match(c.m[b]) {
				b++
			}
			if b == first {
				continue
			}
			off := int64(first) * c.block
			end := min(int64(b)*c.block, c.device)
			for _, r := range c.cut(Run{off, end - off, count%3 == 2}) {
				if !yield(r, nil) {
					return
				}
			}
			count++
		}
		if c.fail != nil {
			yield(Run{}, c.fail)
		}
	}
}

// cut returns r in pieces of one kind each.
func (c *fakeChanges) cut(r Run) (pieces []Run) {
	if c.content == nil {
		return []Run{r}
	}
	for off := r.Off; off < r.Off+r.N; off += fakeBlock {
		n := min(fakeBlock, r.Off+r.N-off)
		zero := !slices.ContainsFunc(c.content[off:off+n], func(b byte) bool { return b != 0 })
		if last := len(pieces) - 1; last >= 0 && pieces[last].Zero == zero {
			pieces[last].N += n
			continue
		}
		pieces = append(pieces, Run{off, n, zero})
	}
	return pieces
}

// lines is what since/NUM must say.
func lines(t *testing.T, runs iter.Seq2[Run, error]) string {
	t.Helper()
	var b []byte
	for r, err := range runs {
		if err != nil {
			t.Fatalf("runs: %v", err)
		}
		kind := "data"
		if r.Zero {
			kind = "zero"
		}
		b = fmt.Appendf(b, "%d %d %s\n", r.Off, r.N, kind)
	}
	return string(b)
}
