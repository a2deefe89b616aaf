package cow

import (
	"cmp"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"blksnap/store"
)

var power = flag.Duration("power", 0, "how long TestPowerLoss tries lives; 0: a few")

const (
	powerSize  = 6 << regionShift
	powerBlock = 4 << 10
)

// stamps are what an origin's sectors hold, by their number: 0 for zeroes.
type stamps map[int64]uint64

// backup is what somebody copied from an image, and what has to be in each increment
// that is made for it.
type backup struct {
	name       string
	generation string
	number     uint64
	size       int64
	base, over stamps         // without and with what was written to the image
	marked     map[int64]bool // by hand, since
}

// powerFacts are what is true when the first at operations were done, and on.
type powerFacts struct {
	at   int
	what string

	size    int64
	now     stamps             // what the sectors hold, to the engine's clients
	flushed stamps             // what they held at the last flush
	later   map[int64][]uint64 // what was written to them since
	backups []*backup
	highest uint64 // number that a snapshot had

	// generation is the one that must outlive a loss of power, empty where none has
	// to. reserved says that all numbers were reserved in the state.
	generation string
	reserved   bool

	// rolling is from which operation on a rollback may have written, -1: none has.
	rolling int
	torn    bool // one that did not end did; it must be told, mayTear: it may
	mayTear bool
}

func (f powerFacts) clone() powerFacts {
	f.now, f.flushed, f.later = maps.Clone(f.now), maps.Clone(f.flushed), maps.Clone(f.later)
	f.backups = slices.Clone(f.backups)
	return f
}

// powerLife is a life of a machine: from a start to a loss of power.
type powerLife struct {
	t     *testing.T
	rng   *rand.Rand
	where string
	disks *disks
	dir   string        // the run directory, empty where nothing outlives the process
	limit time.Duration // how long a state disk is waited for; 0: the default
	block bool          // a block device
	name  string        // of the device; empty: vda
	still bool          // an origin of which nobody can see who wrote to it, as if all writes were ours
	hangs bool          // the snapstore may hang
	cat   *Catalogue
	part  *part // of the snapstore
	pool  *store.Pool
	dev   *Device

	booted int64 // when the machine was started; 0: right before the device is opened

	facts    powerFacts
	timeline []powerFacts
	value    uint64
	snaps    []*Snapshot
	why      atomic.Value // why the last generation began
	bubble   bool         // time passes only when everybody waits
	slow     atomic.Int64 // operations that each call of the state disk waits for
	failing  int          // calls of the state disk that will fail
}

// fact notes what is true from now on.
func (l *powerLife) fact(what string, f func(*powerFacts)) {
	l.facts = l.facts.clone()
	f(&l.facts)
	l.facts.at, l.facts.what = l.disks.length(), what
	l.timeline = append(l.timeline, l.facts)
}

func (l *powerLife) fatalf(format string, args ...any) {
	l.t.Helper()
	l.t.Fatalf("%s: %s", l.where, fmt.Sprintf(format, args...))
}

// start opens the device on what is on the disks, in another boot.
func (l *powerLife) start() {
	l.t.Helper()
	var err error
	if l.cat, err = openCatalogue(l.dir, fmt.Sprintf("%036d", l.rng.Uint64())); err != nil {
		l.fatalf("%v", err)
	}
	l.cat.state, l.cat.disk, l.cat.booted = "/state", l.disks, cmp.Or(l.booted, time.Now().UnixNano())
	m, err := store.OpenMem(256 << 20)
	if err != nil {
		l.fatalf("%v", err)
	}
	l.part = &part{Part: m, hangs: l.hangs}
	l.pool = store.NewPool(l.part)
	l.open()
}

func (l *powerLife) open() {
	l.t.Helper()
	first := uint64(0)
	if !l.facts.reserved {
		first = l.facts.highest + 1 // the clock
	}
	file := diskOrigin{l.disks, l.block, l.still}
	size, _ := file.size()
	var err error
	l.dev, err = l.cat.Open(&Origin{path: "/origin", size: size, file: file}, l.pool, Config{
		Name: cmp.Or(l.name, "vda"), TrackingBlock: powerBlock, Number: first, PreserveLimit: l.limit,
		Notify: func(e Event) {
			if e.Kind == EventGeneration {
				l.why.Store(e.Text)
			}
		},
	})
	if err != nil {
		l.fatalf("%v", err)
	}
}

func (l *powerLife) stop() {
	l.t.Helper()
	if err := errors.Join(l.dev.Close(), l.pool.Close(), l.cat.Close()); err != nil {
		l.fatalf("close: %v", err)
	}
}

func (l *powerLife) must(err error) {
	l.t.Helper()
	if err != nil {
		l.fatalf("%v", err)
	}
}

// sectorsOf are the numbers of the sectors of [off, off+n).
func sectorsOf(off, n int64) (from, to int64) { return off / SectorSize, (off + n) / SectorSize }

// span is a place for a write: few, so that they meet.
func (l *powerLife) span() (off, n int64) {
	region := l.rng.Int64N((l.facts.size + 1<<regionShift - 1) >> regionShift)
	off = region<<regionShift + l.rng.Int64N(24)*blockSize + l.rng.Int64N(2)*l.rng.Int64N(8)*SectorSize
	if l.rng.IntN(8) == 0 {
		off = region<<regionShift - blockSize // over the border of a region
	}
	n = (1 + l.rng.Int64N(24)) * SectorSize
	off = max(0, min(off, l.facts.size-n))
	return off, n
}

// data are sectors that say what they are.
func (l *powerLife) data(off, n int64) []byte {
	l.value++
	p := make([]byte, n)
	for at := int64(0); at < n; at += SectorSize {
		binary.LittleEndian.PutUint64(p[at:], uint64(off+at))
		binary.LittleEndian.PutUint64(p[at+8:], l.value)
	}
	return p
}

func (l *powerLife) write() {
	off, n := l.span()
	p, value := l.data(off, n), l.value
	kind := l.rng.IntN(6)
	if kind >= 4 {
		value = 0
	}
	l.fact("write", func(f *powerFacts) {
		for s, to := sectorsOf(off, n); s < to; s++ {
			f.now[s] = value
			f.later[s] = append(slices.Clone(f.later[s]), value)
		}
	})
	switch kind {
	case 0:
		if err := l.dev.TryWrite(p, off, mustNotTake(l.t)); err == nil {
			return
		}
		fallthrough
	case 1, 2:
		l.must(l.dev.Write(p, off, false))
	case 3:
		l.must(l.dev.Write(p, off, true))
		l.flushed()
	default:
		l.must(l.dev.WriteZeroes(off, n, zeroFlags{NoHole: kind == 4}))
	}
}

// flushed notes that what was acknowledged is on stable storage.
func (l *powerLife) flushed() {
	l.fact("flush", func(f *powerFacts) {
		f.flushed, f.later = maps.Clone(f.now), make(map[int64][]uint64)
	})
}

func (l *powerLife) take() {
	name := fmt.Sprint("s", l.rng.Uint64())
	kept := l.dev.durable.Load() != nil
	s, err := l.cat.Take(name, []*Device{l.dev}, TakeOptions{Limit: time.Minute, Writable: l.rng.IntN(2) == 0})
	l.must(err)
	kept = kept && l.dev.durable.Load() != nil
	l.snaps = append(l.snaps, s)
	i := s.images[0]
	l.fact("take", func(f *powerFacts) {
		f.backups = append(f.backups, &backup{
			name: name, generation: i.Changes().Generation(), number: i.Changes().Number(), size: f.size,
			base: f.now, over: f.now, marked: make(map[int64]bool),
		})
		if i.Changes().Number() <= f.highest {
			l.fatalf("number %d is given again", i.Changes().Number())
		}
		f.highest = i.Changes().Number()
		f.reserved = f.reserved && kept
	})
}

// anySnapshot is a healthy one, nil where there is none.
func (l *powerLife) anySnapshot() (*Snapshot, int) {
	l.snaps = slices.DeleteFunc(l.snaps, func(s *Snapshot) bool { return s.images[0].Err() != nil })
	if len(l.snaps) == 0 {
		return nil, 0
	}
	s := l.snaps[l.rng.IntN(len(l.snaps))]
	return s, slices.IndexFunc(l.facts.backups, func(b *backup) bool { return b.name == s.name })
}

func (l *powerLife) writeImage() {
	s, k := l.anySnapshot()
	if s == nil || !s.images[0].Writable() {
		return
	}
	off, n := l.span()
	if off+n > s.images[0].size {
		return
	}
	p, value := l.data(off, n), l.value
	l.must(s.images[0].Write(p, off, false))
	l.fact("write to an image", func(f *powerFacts) {
		b := *f.backups[k]
		b.over = maps.Clone(b.over)
		for s, to := sectorsOf(off, n); s < to; s++ {
			b.over[s] = value
		}
		f.backups[k] = &b
	})
}

func (l *powerLife) rollBack() {
	s, k := l.anySnapshot()
	if s == nil || s.images[0].size > l.facts.size {
		return
	}
	to := l.facts.backups[k]
	l.fact("roll back", func(f *powerFacts) {
		for no := range union(to.base, f.now) {
			if v := to.base[no]; v != f.now[no] && no*SectorSize < to.size {
				f.now[no] = v
				f.later[no] = append(slices.Clone(f.later[no]), v)
			}
		}
		f.rolling = l.disks.length()
	})
	l.must(s.images[0].Rollback())
	l.flushed()
	l.fact("rolled back", func(f *powerFacts) { f.rolling = -1 })
}

func union(a, b stamps) map[int64]bool {
	u := make(map[int64]bool)
	for no := range a {
		u[no] = true
	}
	for no := range b {
		u[no] = true
	}
	return u
}

func (l *powerLife) mark() {
	off, n := l.span()
	l.must(l.dev.Mark(off, n))
	l.fact("mark", func(f *powerFacts) {
		for k := range f.backups {
			b := *f.backups[k]
			b.marked = maps.Clone(b.marked)
			for s, to := sectorsOf(off, n); s < to; s++ {
				b.marked[s] = true
			}
			f.backups[k] = &b
		}
	})
}

// unkept notes that no generation has to outlive what comes.
func (l *powerLife) unkept(what string) {
	l.fact(what, func(f *powerFacts) { f.generation = "" })
}

func (l *powerLife) reset() {
	l.unkept("reset")
	l.must(l.dev.Reset("test"))
	was := l.facts.backups
	l.fact("reset done", func(f *powerFacts) {
		// Nobody may be told what changed since these any more.
		f.backups = nil
		for _, b := range was {
			b := *b
			b.generation = "reset"
			f.backups = append(f.backups, &b)
		}
	})
}

func (l *powerLife) resize() {
	l.unkept("resize")
	if l.rng.IntN(2) == 0 && l.facts.size > 2<<regionShift {
		size := l.facts.size - l.rng.Int64N(1<<15)*SectorSize - SectorSize
		l.fact("shrink", func(f *powerFacts) {
			beyond := func(no int64) bool { return no*SectorSize >= size }
			maps.DeleteFunc(f.flushed, func(no int64, _ uint64) bool { return beyond(no) })
			maps.DeleteFunc(f.later, func(no int64, _ []uint64) bool { return beyond(no) })
			maps.DeleteFunc(f.now, func(no int64, _ uint64) bool { return beyond(no) })
		})
		l.must(l.dev.Shrink(size))
		l.fact("shrunk", func(f *powerFacts) { f.size = size })
		return
	}
	was := l.facts.size
	size := was + l.rng.Int64N(1<<15)*SectorSize + SectorSize
	l.must(diskOrigin{disks: l.disks}.truncate(size))
	l.must(l.dev.Resize())
	l.fact("grown", func(f *powerFacts) {
		f.size = size
		f.now[was/SectorSize], f.now[size/SectorSize-1] = 0, 0
	})
}

// again removes the device and puts the same origin under tracking again.
func (l *powerLife) again() {
	l.fact("remove", func(f *powerFacts) { f.generation, f.reserved, f.torn, f.mayTear = "", false, false, f.torn })
	for _, s := range l.snaps {
		if err := s.Destroy(true); err != nil && !errors.Is(err, ErrDestroyed) {
			l.fatalf("%v", err)
		}
	}
	l.snaps = nil
	l.must(l.dev.Remove())
	l.open()
	l.fact("added", func(f *powerFacts) { f.mayTear = false })
}

// checkpoint writes the map down as the device does every minute.
func (l *powerLife) checkpoint() error {
	for begun := time.Now(); ; {
		l.dev.keeping <- struct{}{}
		if l.dev.durable.Load() != nil && l.dev.reason.Load() == nil {
			break
		}
		<-l.dev.keeping
		l.dev.poke()
		if time.Since(begun) > 20*time.Second {
			return errors.New("the device does not keep its change map")
		}
		time.Sleep(50 * time.Microsecond)
	}
	defer func() { <-l.dev.keeping }()
	return l.dev.checkpoint()
}

// kept notes that the generation must outlive a loss of power.
func (l *powerLife) kept() {
	if l.block {
		return // only after a clean end
	}
	l.fact("checkpoint", func(f *powerFacts) { f.generation, f.reserved = l.dev.Changes().Generation(), true })
}

// writeDuring writes, and flushes, while the map is written down.
func (l *powerLife) writeDuring() {
	// Both are slow, so that each gets on during what the other does.
	more := l.rng.IntN(12)
	slow := func() { l.wait(more, time.Millisecond) }
	l.disks.pause.Store(&slow)
	l.slow.Store(int64(1 + l.rng.IntN(4)))
	defer func() {
		l.disks.pause.Store(nil)
		l.slow.Store(0)
	}()
	done := begin(l.checkpoint)
	for range 1 + l.rng.IntN(5) {
		if l.rng.IntN(4) == 0 {
			l.must(l.dev.Flush())
			l.flushed()
		} else {
			l.write()
		}
	}
	l.must(<-done)
	l.kept()
}

// wait waits until more operations were done, but not for long.
func (l *powerLife) wait(more int, most time.Duration) {
	until, late := l.disks.length()+more, time.Now().Add(most)
	for l.disks.length() < until && time.Now().Before(late) {
		runtime.Gosched()
	}
}

// fail has some calls of the state disk fail.
func (l *powerLife) fail() {
	l.fact("fail", func(f *powerFacts) { f.generation, f.reserved = "", false })
	l.disks.mu.Lock()
	l.failing = 1 + l.rng.IntN(3)
	l.disks.mu.Unlock()
	for range 3 {
		l.write()
	}
	l.take()
	if err := l.checkpoint(); err != nil && !errors.Is(err, errIO) {
		l.fatalf("%v", err)
	}
	l.disks.mu.Lock()
	l.failing = 0
	l.disks.mu.Unlock()
}

// ask fails the calls of the state disk that are to fail, and has others wait.
func (l *powerLife) ask(what string) error {
	if n := l.slow.Load(); n > 0 {
		l.wait(int(n), 200*time.Microsecond)
	}
	l.disks.mu.Lock()
	defer l.disks.mu.Unlock()
	if l.failing == 0 {
		return nil
	}
	l.failing--
	return fmt.Errorf("%s: %w", what, errIO)
}

// run lives for n steps, and may end in order.
func (l *powerLife) run(n int) {
	for range n {
		switch k := l.rng.IntN(100); {
		case k < 38:
			l.write()
		case k < 46:
			l.must(l.dev.Flush())
			l.flushed()
		case k < 58:
			l.take()
		case k < 66:
			l.writeImage()
		case k < 70:
			l.mark()
		case k < 77:
			l.must(l.checkpoint())
			l.kept()
		case k < 86:
			l.writeDuring()
		case k < 89:
			if s, _ := l.anySnapshot(); s != nil {
				l.must(s.Destroy(false))
			}
		case k < 93:
			l.rollBack()
		case k < 95:
			l.reset()
		case k < 97:
			l.resize()
		case k < 98:
			l.again()
		case k < 99:
			l.fail()
		default:
			m, err := store.OpenMem(1 << 20)
			l.must(err)
			l.must(l.pool.Add(m))
		}
	}
	if l.rng.IntN(2) == 0 {
		l.must(l.checkpoint())
		l.kept()
		generation := l.dev.Changes().Generation()
		l.must(l.dev.Close())
		l.flushed()
		l.fact("closed", func(f *powerFacts) { f.generation = generation })
	}
}

// check starts on what is left, and looks whether it is what the facts say it is.
func (l *powerLife) check() {
	l.t.Helper()
	f := l.facts
	for no := range union(f.flushed, f.now) {
		if no*SectorSize >= l.disks.origin.size {
			continue
		}
		if got := l.onDisk(no); got != f.flushed[no] && !slices.Contains(f.later[no], got) {
			l.fatalf("sector %d holds %d, want what was flushed, %d, or any of %v", no, got, f.flushed[no], f.later[no])
		}
	}
	l.timeline = []powerFacts{f}
	l.timeline[0].at = 0
	l.start()
	d := l.dev
	if found, _, err := l.cat.Recover(); err != nil || len(found) > 0 {
		l.fatalf("there are %d snapshots after a loss of power (%v)", len(found), err)
	}
	generation := d.Changes().Generation()
	if f.generation != "" && generation != f.generation {
		l.fatalf("generation\n got %v\nwant %s", l.why.Load(), f.generation)
	}
	l.checkTear()
	for _, b := range f.backups {
		l.checkIncrement(b, generation)
	}
	l.fact("start after a cut", func(f *powerFacts) {
		for no := range union(f.flushed, f.now) {
			if no*SectorSize < l.disks.origin.size {
				f.now[no] = l.onDisk(no)
			}
		}
		f.flushed, f.later, f.size = maps.Clone(f.now), make(map[int64][]uint64), l.disks.origin.size
		maps.DeleteFunc(f.now, func(no int64, _ uint64) bool { return no*SectorSize >= f.size })
		if l.block {
			f.generation = "" // from the first write on
		} else if l.why.Load() == nil {
			f.generation = generation
		}
	})
	l.take()
}

// onDisk is what a sector says.
func (l *powerLife) onDisk(no int64) uint64 {
	s := l.disks.origin.sectors[no]
	if s == nil {
		return 0
	}
	if v := binary.LittleEndian.Uint64(s[8:]); v == 0 || int64(binary.LittleEndian.Uint64(s[:])) == no*SectorSize {
		return v
	}
	l.fatalf("sector %d holds another one", no)
	return 0
}

// checkIncrement looks whether the next increment makes a backup what the origin is.
func (l *powerLife) checkIncrement(b *backup, generation string) {
	l.t.Helper()
	view := l.dev.changes().View()
	defer view.Release()
	since, ok := view.Since(b.number)
	if !ok {
		if b.generation == l.facts.generation {
			l.fatalf("what changed since %d is not known, only since %d to %d", b.number, view.Base(), view.Number())
		}
		return
	}
	if b.generation != "" && b.generation != generation {
		l.fatalf("what changed since %d is told, in generation %s, but it was in %s", b.number, generation, b.generation)
	}
	var runs [][2]int64
	for off, n := range since {
		runs = append(runs, [2]int64{off, off + n})
	}
	isReported := func(no int64) bool {
		i, found := slices.BinarySearchFunc(runs, no*SectorSize, func(r [2]int64, off int64) int { return cmp.Compare(r[0], off) })
		return found || i > 0 && no*SectorSize < runs[i-1][1]
	}
	for no := range b.touched(l.facts) {
		if no*SectorSize < view.Size() {
			now := l.onDisk(no)
			if (now != b.base[no] || now != b.over[no] || b.marked[no] || no*SectorSize >= b.size) && !isReported(no) {
				l.fatalf("the increment since %d misses sector %d: the backup has %d (and %d), the origin %d", b.number, no, b.base[no], b.over[no], now)
			}
		}
	}
}

// touched are the sectors that the next increment may have to hold.
func (b *backup) touched(f powerFacts) map[int64]bool {
	u := maps.Clone(b.marked)
	for _, s := range []stamps{b.base, b.over, f.now, f.flushed} {
		for no := range s {
			u[no] = true
		}
	}
	return u
}

// checkTear looks whether a device says that it is between two states.
func (l *powerLife) checkTear() {
	state := l.dev.State()
	told := strings.HasPrefix(state, "failed: a rollback to ")
	switch {
	case state != "ok" && !told:
		l.fatalf("state %q", state)
	case told && !l.facts.torn && !l.facts.mayTear:
		l.fatalf("state %q without a rollback", state)
	case !told && l.facts.torn:
		l.fatalf("it is torn and does not say so")
	}
	l.facts.torn, l.facts.mayTear = told, false
}

// tornAt says whether the first k operations leave an origin into which a rollback,
// which had not begun before from, has written something and not flushed all of it.
func (l *powerLife) tornAt(from, k int) bool {
	l.disks.mu.Lock() // a checkpoint may be under way
	defer l.disks.mu.Unlock()
	last, synced := -1, -1
	for i, o := range l.disks.ops[:k] {
		switch {
		case o.node != l.disks.origin:
		case o.what == "write" && i >= from:
			last = i
		case o.what == "sync":
			synced = max(synced, o.covers)
		}
	}
	return last >= 0 && synced <= last
}

// powerCuts are cuts, and what they left.
type powerCuts struct {
	t          *testing.T
	every      int // one of how many operations is a place to cut at
	deep       int // one of how many cuts is followed by another life
	cuts, kept int
}

// explore cuts l at its operations, in several ways each.
func (c *powerCuts) explore(l *powerLife, depth int) {
	n, at := l.disks.length(), 0
	for k := range n + 1 {
		for at+1 < len(l.timeline) && l.timeline[at+1].at <= k {
			at++
		}
		if l.rng.IntN(c.every) != 0 && k != n {
			continue
		}
		for _, p := range []float64{0, 1, 0.5, 0.1, 0.9} {
			if p != 1 && p != 0 && l.rng.IntN(3) != 0 {
				continue
			}
			c.cut(l, k, p, l.timeline[at].clone(), depth)
		}
	}
}

// cut loses power after k operations, and looks at what is left.
func (c *powerCuts) cut(l *powerLife, k int, p float64, f powerFacts, depth int) {
	next := &powerLife{
		t: c.t, rng: l.rng, disks: l.disks.afterCut(k, p, l.rng), block: l.block, still: l.still, facts: f, value: l.value,
		where: fmt.Sprintf("%s\n\tcut after %d operations, in %q, %.0f %% of the rest left", l.where, k, f.what, 100*p),
	}
	next.disks.before = next.ask
	if f.rolling >= 0 {
		next.facts.torn, next.facts.mayTear = f.torn || l.tornAt(f.rolling, k), true
	}
	next.facts.rolling = -1
	c.cuts++
	next.check()
	if f.generation != "" {
		c.kept++
	}
	if depth > 0 && l.rng.IntN(c.deep) == 0 {
		next.run(4 + l.rng.IntN(10))
		c.explore(next, depth-1)
	}
	next.stop()
}

// TestPowerLoss loses power after each of the operations that lives of a device do on
// its origin and in its state directory, with all, nothing and some of what was not
// flushed left, and starts on it: what was flushed is there, the change map misses
// nothing, numbers go on, and the generation, where nothing happened to it.
func TestPowerLoss(t *testing.T) {
	rng := newRand(t)
	c := &powerCuts{t: t, every: 16, deep: 40}
	lives := 0
	for begun := time.Now(); lives < 10 || time.Since(begun) < *power; lives++ {
		l := &powerLife{t: t, rng: rng, disks: newDisks(powerSize), block: lives%4 == 3, still: lives%4 == 1, where: fmt.Sprintf("life %d", lives)}
		l.facts = powerFacts{
			size: powerSize, now: make(stamps), flushed: make(stamps), later: make(map[int64][]uint64),
			reserved: true, rolling: -1,
		}
		l.disks.before = l.ask
		l.fact("start", func(*powerFacts) {})
		l.start()
		l.run(60)
		c.explore(l, 1)
		l.stop()
	}
	if c.kept == 0 {
		t.Error("no generation outlived a loss of power")
	}
	t.Logf("%d lives, power lost %d times, in %d of them the generation had to go on", lives, c.cuts, c.kept)
}
