// Who changes more of the devices of a daemon that will be killed than their bytes.

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
)

// resize makes a device larger or smaller.
func (l *life) resize(rng *rand.Rand) error {
	k := l.devices["vdb"]
	k.pause.Lock()
	defer k.pause.Unlock()
	k.epoch++
	was := int64(len(k.now))
	now := siegeBase/2 + rng.Int64N(siegeBase/SectorSize)*SectorSize
	if now == was {
		return nil
	}
	k.resize = &[2]int64{was, now}
	request := map[string]any{}
	if now < was {
		request["shrink"] = now
	} else {
		k.grown = true
		if err := os.Truncate(k.origin, now); err != nil {
			return err
		}
	}
	err := l.d.call("POST", "/devices/vdb/resize", request, nil)
	switch {
	case err == nil:
		k.resized(now)
		l.count("resized")
	case now < was && refused(err, "full") && l.mayBeFull():
		l.count("shrink refused")
	default:
		return fmt.Errorf("resize vdb from %d to %d: %w", was, now, err)
	}
	k.resize, k.grown = nil, false
	return nil
}

// mayBeFull says whether there is anything for which a snapshot may need more space
// than it can have.
func (s *siege) mayBeFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tight || slices.ContainsFunc(s.snapshots, func(sn *taken) bool { return sn.limited })
}

// resized makes the model as long as the device has become.
func (k *target) resized(size int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.now = append(k.now[:min(size, int64(len(k.now)))], make([]byte, max(0, size-int64(len(k.now))))...)
}

// reset begins a new generation of a device.
func (l *life) reset(rng *rand.Rand) error {
	if rng.IntN(4) != 0 {
		return nil
	}
	k := l.devices["vdb"]
	k.resetting = true
	if err := l.d.call("POST", "/devices/vdb/cbt/reset", nil, nil); err != nil {
		return fmt.Errorf("reset: %w", err)
	}
	var facts deviceFacts
	if err := l.d.call("GET", "/devices/vdb", nil, &facts); err != nil {
		return err
	}
	l.count("reset")
	return k.renew(facts.CBT)
}

// renew notes a new generation.
func (k *target) renew(facts cbtFacts) error {
	if facts.Generation == k.generation {
		return fmt.Errorf("%s: the generation goes on after a reset", k.name)
	}
	k.resetting = false
	k.generation, k.marks, k.reset = facts.Generation, nil, facts.Number
	return nil
}

// mark marks a range by hand.
func (l *life) mark(rng *rand.Rand) error {
	k := l.devices[[]string{"vda", "vdb"}[rng.IntN(2)]]
	k.mu.Lock()
	off, n := randomRange(rng, int64(len(k.now)), 64*kiB)
	k.mu.Unlock()
	m := marking{k.number, off, n}
	err := l.d.call("POST", "/devices/"+k.name+"/cbt/mark", map[string]any{"ranges": []string{fmt.Sprintf("%d:%d", off, n)}}, nil)
	if err != nil {
		return fmt.Errorf("mark %d:%d of %s: %w", off, n, k.name, err)
	}
	if k.marks = append(k.marks, m); len(k.marks) > 3 {
		k.marks = k.marks[1:]
	}
	l.count("marked")
	return nil
}

// addPart adds a part to the snapstore.
func (l *life) addPart(rng *rand.Rand) error {
	l.mu.Lock()
	n := len(l.parts)
	path := filepath.Join(l.d.dir, fmt.Sprint("store", n))
	if n >= mostParts || rng.IntN(4) != 0 {
		l.mu.Unlock()
		return nil
	}
	l.parts[path] = unknown
	l.mu.Unlock()
	if err := l.d.call("POST", "/store", map[string]any{"spec": "file:" + path + ":1MiB"}, nil); err != nil {
		return fmt.Errorf("add part %s: %w", path, err)
	}
	l.mu.Lock()
	l.parts[path] = present
	l.mu.Unlock()
	l.count("part added")
	return nil
}

// changeExtra adds the device that comes and goes, or removes it.
func (l *life) changeExtra() error {
	was := l.extra
	l.extra = unknown
	if was == present {
		if err := l.d.call("DELETE", "/devices/"+extraName, nil, nil); err != nil {
			return fmt.Errorf("remove a device: %w", err)
		}
		l.extra = absent
		return nil
	}
	request := map[string]any{"name": extraName, "origin": filepath.Join(l.d.dir, extraName+".img")}
	if err := l.d.call("POST", "/devices", request, nil); err != nil {
		return fmt.Errorf("add a device: %w", err)
	}
	l.extra = present
	l.count("device added")
	return nil
}
