// Who takes and destroys the snapshots of a daemon that will be killed, rolls devices
// back to them, and looks around.

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"time"
)

const (
	mostSnapshots = 5
	mostParts     = 4
	mostCopies    = 3
)

// keep does one thing.
func (l *life) keep(rng *rand.Rand) error {
	switch n := rng.IntN(40); {
	case n < 14:
		return l.take(rng)
	case n < 24:
		return l.destroyOne(rng)
	case n < 27:
		return l.rollBack(rng)
	case n < 29:
		return l.resize(rng)
	case n < 30:
		return l.reset(rng)
	case n < 33:
		return l.mark(rng)
	case n < 34:
		return l.addPart(rng)
	case n < 36:
		return l.changeExtra()
	}
	return l.look()
}

// take takes a snapshot.
func (l *life) take(rng *rand.Rand) error {
	l.mu.Lock()
	if len(l.snapshots) >= mostSnapshots {
		l.mu.Unlock()
		return l.destroyOne(rng)
	}
	l.names++
	sn := &taken{name: fmt.Sprint("s", l.names), state: unknown, images: make(map[string]*shot)}
	l.snapshots = append(l.snapshots, sn)
	l.mu.Unlock()

	request := map[string]any{"name": sn.name}
	devices := []string{"vda", "vdb"}
	if i := rng.IntN(8); i < 2 {
		devices = devices[i : i+1]
	}
	request["devices"] = devices
	if sn.writable = rng.IntN(2) == 0; sn.writable {
		request["writable"] = true
	}
	if sn.limited = rng.IntN(10) == 0; sn.limited {
		request["max_store"] = (1 + rng.IntN(16)) * 128 * kiB
	}
	if rng.IntN(12) == 0 {
		ttl := 300*time.Millisecond + time.Duration(rng.IntN(int(time.Second)))
		sn.expires = time.Now().Add(ttl) // or a little later
		request["ttl_ns"] = ttl
	}
	for _, name := range devices {
		k := l.devices[name]
		sn.images[name] = &shot{disk: newDisk(name, &l.ticks, nil), instant: k.begin()}
	}
	var facts snapshotFacts
	err := l.d.call("POST", "/snapshots", request, &facts)
	switch {
	case err == nil:
		l.endMoments(sn)
		l.count("taken")
		return l.learn(sn, facts)
	case l.tight && refused(err, "full"):
		l.endMoments(sn)
		l.forget(sn)
		return nil
	}
	return fmt.Errorf("take %s: %w", sn.name, err)
}

func (s *siege) endMoments(sn *taken) {
	for name, i := range sn.images {
		s.devices[name].end(i.instant)
	}
}

// learn notes a snapshot that is known to be there.
func (s *siege) learn(sn *taken, facts snapshotFacts) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	sn.state, sn.created = present, facts.Created
	if len(facts.Images) != len(sn.images) {
		return fmt.Errorf("%s has images %+v, want %d", sn.name, facts.Images, len(sn.images))
	}
	for _, i := range facts.Images {
		k := s.devices[i.Device]
		switch shot := sn.images[i.Device]; {
		case shot == nil:
			return fmt.Errorf("%s has an image of %s", sn.name, i.Device)
		case i.CBT.Number <= k.number:
			return fmt.Errorf("%s of %s has the number %d, after %d was given", sn.name, i.Device, i.CBT.Number, k.number)
		default:
			shot.number, k.number = i.CBT.Number, i.CBT.Number
		}
	}
	return nil
}

// forget takes a snapshot out that is not there any more.
func (s *siege) forget(sn *taken) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetLocked(sn)
}

// forgetLocked keeps copies of its images: increments go on from them.
func (s *siege) forgetLocked(sn *taken) {
	sn.state = absent
	s.snapshots = slices.DeleteFunc(s.snapshots, func(o *taken) bool { return o == sn })
	for name, i := range sn.images {
		k := s.devices[name]
		if i.noted == nil || sn.lost {
			continue
		}
		k.copies = append(k.copies, copied{i.number, i.content()})
		k.copies = k.copies[max(0, len(k.copies)-mostCopies):]
	}
}

// choose returns a snapshot that is there.
func (s *siege) choose(rng *rand.Rand, good func(*taken) bool) *taken {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*taken
	for _, sn := range s.snapshots {
		if sn.state == present && (good == nil || good(sn)) {
			all = append(all, sn)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[rng.IntN(len(all))]
}

// destroyOne destroys a snapshot, by a request or in the tree, where it is refused
// if the snapshot is in use.
func (l *life) destroyOne(rng *rand.Rand) error {
	sn := l.choose(rng, nil)
	if sn == nil {
		return nil
	}
	l.setState(sn, unknown)
	if rng.IntN(3) == 0 {
		switch err := syscall.Rmdir(l.d.snapshot(sn.name)); {
		case err == syscall.EBUSY:
			l.setState(sn, present)
			return nil
		case err == syscall.ENOENT && sn.mayBeGone():
		case err != nil:
			return fmt.Errorf("rmdir %s: %w", sn.name, err)
		}
	} else {
		err := l.d.call("POST", "/snapshots/destroy", map[string]any{"names": []string{sn.name}, "force": true}, nil)
		if err != nil && !(refused(err, "not-found") && sn.mayBeGone()) {
			return fmt.Errorf("destroy %s: %w", sn.name, err)
		}
	}
	l.count("destroyed")
	l.forget(sn)
	return nil
}

func (s *siege) setState(sn *taken, state tristate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sn.state = state
}

// rollBack makes a device what it was.
func (l *life) rollBack(rng *rand.Rand) error {
	name := []string{"vda", "vdb"}[rng.IntN(2)]
	k := l.devices[name]
	sn := l.choose(rng, func(sn *taken) bool {
		i := sn.images[name]
		return i != nil && i.noted != nil && !sn.lost && sn.expires.IsZero()
	})
	if sn == nil {
		return nil
	}
	k.pause.Lock()
	defer k.pause.Unlock()
	k.epoch++
	noted := sn.images[name].noted
	if len(noted) > len(k.now) {
		return nil
	}
	back := k.send(0, slices.Concat(noted, k.now[len(noted):]))
	back.whole = true
	err := l.d.call("POST", "/snapshots/"+sn.name+"/rollback", map[string]any{"devices": []string{name}, "force": true}, nil)
	switch {
	case err == nil:
		k.ack(back)
		l.count("rolled back")
		return nil
	case refused(err, "full", "failed") && l.mayBeFull():
		k.refused(back)
		l.count("rollback refused")
		return nil
	}
	return fmt.Errorf("roll %s back to %s: %w", name, sn.name, err)
}

// look asks for what can be seen.
func (l *life) look() error {
	for _, path := range []string{"/devices", "/snapshots", "/store", "/version"} {
		if err := l.d.call("GET", path, nil, nil); err != nil {
			return fmt.Errorf("get %s: %w", path, err)
		}
	}
	_, err := os.ReadDir(l.d.snapshot())
	return err
}
