// A daemon that is killed again and again, and what must be true of it.

package test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// siege is a daemon, and what it was told that must outlive it.
type siege struct {
	t       *testing.T
	d       *daemon
	rng     *rand.Rand
	binary  []string // builds of the daemon, which take turns
	args    []string // of serve, the same each time
	tight   bool     // the snapstore is small: snapshots may overflow
	ticks   clock
	passes  atomic.Uint64
	devices map[string]*target

	use string // what the snapstore held when the daemon was killed at rest

	noting sync.Mutex // held by who reads a snapshot for the first time

	// Protects the fields below, and those of snapshots and the extra device.
	mu        sync.Mutex
	snapshots []*taken // oldest first
	names     int
	parts     map[string]tristate // files that are parts of the snapstore
	extra     tristate            // a device that comes and goes
	told      map[string]int      // what happened, for the log
}

// tristate is whether something is there, as far as is known.
type tristate int

const (
	absent tristate = iota
	unknown
	present
)

// target is a device.
type target struct {
	*disk
	origin string

	// pause is held shared by each request of a client, and exclusively by what
	// needs that there are none. Clients connect again when epoch has changed.
	pause sync.RWMutex
	epoch int

	// The fields below belong to who keeps the snapshots, and between two lives to
	// the siege.

	generation string
	number     uint64    // the highest known of a snapshot
	resetting  bool      // a new generation may have begun
	resize     *[2]int64 // it may have either size
	grown      bool      // by us, of which the daemon may not know
	foreign    bool      // so that it took that for somebody else's doing
	reset      uint64    // numbers up to this one are of earlier generations
	marks      []marking
	copies     []copied
}

// marking is a range that was marked by hand, after the snapshot with the number.
type marking struct {
	number uint64
	off, n int64
}

// copied is a copy of an image.
type copied struct {
	number  uint64
	content []byte
}

// taken is a snapshot.
type taken struct {
	name     string
	state    tristate // unknown: it is being taken or destroyed
	lost     bool     // it has overflowed
	writable bool
	limited  bool      // it may overflow at any time
	expires  time.Time // zero: never
	created  time.Time
	images   map[string]*shot
}

// shot is an image of a snapshot. Before it was read for the first time, the disk
// has no content.
type shot struct {
	*disk
	instant *moment
	noted   []byte // the image but for what was written to it
	number  uint64
}

const (
	siegeBase = 6 * miB // about the size of a device
	extraName = "vdx"
)

func newSiege(t *testing.T, tight bool, binary ...string) *siege {
	s := &siege{t: t, d: newDaemon(t, nil), tight: tight, binary: binary,
		rng:     rand.New(rand.NewPCG(uint64(*seed), 17)),
		devices: make(map[string]*target), parts: make(map[string]tristate), told: make(map[string]int)}
	dir := s.d.dir
	for name, size := range map[string]int64{"vda": siegeBase + 3*SectorSize, "vdb": siegeBase} {
		content := make([]byte, size)
		Stamp(content[:size/2/SectorSize*SectorSize], name, 0, s.pass())
		origin := filepath.Join(dir, name+".img")
		write(t, origin, content)
		s.devices[name] = &target{disk: newDisk(name, &s.ticks, content), origin: origin}
	}
	write(t, filepath.Join(dir, extraName+".img"), make([]byte, 64*kiB))
	limit := "256MiB"
	if tight {
		limit = "6MiB"
	}
	s.parts[filepath.Join(dir, "store")] = present
	s.args = []string{s.devices["vda"].origin, "--store", "file:" + filepath.Join(dir, "store") + ":" + limit}
	return s
}

func (s *siege) pass() uint64 { return s.passes.Add(1) }

// count notes that something has happened.
func (s *siege) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told[what]++
}

// story says what has happened.
func (s *siege) story() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var words []string
	for _, what := range slices.Sorted(maps.Keys(s.told)) {
		words = append(words, fmt.Sprintf("%s %d", what, s.told[what]))
	}
	return strings.Join(words, ", ")
}

// start starts the daemon, some build of it.
func (s *siege) start() {
	s.t.Helper()
	s.d.path = s.binary[s.rng.IntN(len(s.binary))]
	if s.rng.IntN(8) == 0 { // and kill it before it is ready, perhaps
		s.d.launch(s.args...)
		time.Sleep(time.Duration(s.rng.IntN(40)) * time.Millisecond)
		s.d.kill()
		s.count("killed in the start")
	}
	s.d.start(s.args...)
}

// prepare makes what is there from the first life on.
func (s *siege) prepare() {
	s.t.Helper()
	s.start()
	s.d.blksnap("device", "add", "--tracking-block", "4KiB", s.devices["vdb"].origin)
	for name, k := range s.devices {
		var facts deviceFacts
		if err := s.d.call("GET", "/devices/"+name, nil, &facts); err != nil {
			s.t.Fatal(err)
		}
		k.generation, k.number = facts.CBT.Generation, facts.CBT.Number
	}
}

// finish destroys all snapshots, one of them last, and checks what the snapstore holds
// of that alone, and that nothing is left at the end.
func (s *siege) finish() {
	s.t.Helper()
	last := s.choose(s.rng, func(sn *taken) bool { return sn.expires.IsZero() })
	for _, sn := range s.snapshots {
		if sn != last {
			s.end(sn)
		}
	}
	s.wantUse("of one snapshot")
	if last != nil {
		s.end(last)
	}
	if used := s.wantUse("without a snapshot"); used != 0 {
		s.t.Errorf("without a snapshot the snapstore uses %d bytes", used)
	}
	for path := range s.parts {
		eventually(s.t, path+" is empty", func() bool {
			st, err := os.Stat(path)
			return err == nil && st.Sys().(*syscall.Stat_t).Blocks*512 <= 64*kiB
		})
	}
	s.d.stop()
}

// end destroys a snapshot.
func (s *siege) end(sn *taken) {
	s.t.Helper()
	r := s.d.try("snapshot", "destroy", "--force", sn.name)
	if r.status != 0 && !sn.mayBeGone() {
		s.t.Errorf("destroy %s: %s", sn.name, r.stderr)
	}
}

// wantUse waits until the snapstore uses exactly what the images say that they hold, of
// each device one at most, and df says the same. It returns how much that is.
func (s *siege) wantUse(when string) (used int64) {
	s.t.Helper()
	eventually(s.t, "the snapstore uses what images hold, "+when, func() bool {
		var parts []partFacts
		s.get("/store", &parts)
		var snapshots []snapshotFacts
		s.get("/snapshots", &snapshots)
		var size, free, held int64
		used = 0
		for _, p := range parts {
			size, used, free = size+p.Size, used+p.Used, free+p.Free
		}
		for _, sn := range snapshots {
			for _, i := range sn.Images {
				held += i.Holds
			}
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(s.d.mount, &fs); err != nil {
			s.t.Fatal(err)
		}
		return used == held && used+free == size && int64(fs.Blocks)*fs.Bsize == size && int64(fs.Bfree)*fs.Bsize == free
	})
	return used
}

// mayBeGone says whether the snapshot's time is over.
func (sn *taken) mayBeGone() bool {
	return !sn.expires.IsZero() && time.Now().After(sn.expires)
}
